"""Reading of shards from a local folder, an object store or a web server.

Members of a remote shard are read from the copy in the cache (``lrm_pl.data.cache``). If there is no copy, they are
read with range requests while threads copy the shard, so that the first step does not wait for complete shards.
"""

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrm_pl.data.cache import CacheConfig, ShardCache
from lrm_pl.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    MemberIndex,
    Shard,
    ShardError,
    parse_index,
    parse_manifest,
    read_index,
    read_manifest,
    read_members,
)
from lrm_pl.storage import (
    MissingError,
    StoreDownError,
    StoreError,
    is_local,
    open_store,
    read_ranges,
    retry,
    store_errors,
)

logger = logging.getLogger(__name__)

#: Maximum number of concurrent shard downloads per process.
_MAX_DOWNLOADS = 2

#: Number of consecutive unreadable files after which a store is considered unavailable.
_MAX_FAILURES = 4

#: Seconds after which reading of an unreadable file is attempted again.
_RETRY_AFTER_S = 300.0


class ShardSource:
    """A local or remote folder of shards.

    Args:
        location: Path or URL (``s3://``, ``gs://``, ``https://``) of the folder.
        cache: Settings for reading shards from a URL.

    Raises:
        InputError: The fsspec package for the URL is not installed.
    """

    def __init__(self, location: str, cache: CacheConfig = CacheConfig()) -> None:  # noqa: B008 - frozen
        self.local = is_local(location)
        self.location = (os.path.expanduser(location) if self.local else location).rstrip("/")
        self.config = cache
        self._cache = None if self.local or not cache.gigabytes else ShardCache(self.location, cache)
        self._unreadable: dict[str, tuple[float, str]] = {}  # file -> time and message of the failure
        self._failed_in_a_row: set[str] = set()
        self._prefetching: set[str] = set()
        self._checked: set[str] = set()
        self._prefetch_queue: tuple[int, queue.SimpleQueue[Shard]] | None = None

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            ShardError: The manifest is missing or invalid.
            StoreError: The store does not respond.
        """
        if self.local:
            return read_manifest(Path(self.location))
        where = f"{self.location}/{MANIFEST_NAME}"
        try:
            return parse_manifest(self._read_file(where), where)
        except MissingError as error:
            raise ShardError(
                expected=f"finished shards at {self.location}",
                found=f"no {MANIFEST_NAME}: {error}",
                remedy="copy the whole folder of shards to this URL",
            ) from error

    def index(self, shard: Shard) -> MemberIndex:
        """Read the member index of a shard.

        Raises:
            ShardError: The index does not match the shard.
            StoreError: The store does not respond.
        """
        if self.local:
            return read_index(Path(self.location), shard)
        where = f"{self.location}/{shard.index_name}"
        with self._tracked(shard.index_name):
            return parse_index(self._read_file(where), where, shard)

    def read(self, shard: Shard, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read byte ranges of a shard.

        Args:
            shard: The shard.
            spans: Offset and size of each range in bytes.

        Returns:
            The content of each range.

        Raises:
            SampleError: The shard is truncated.
            OSError: The shard cannot be read. For a URL, this is a ``StoreError``.
            StoreDownError: Several consecutive files could not be read.
        """
        if self.local:
            return read_members(Path(self.location) / shard.name, spans)
        if self._cache is not None and (copy := self._cache.find(shard)) is not None:
            with contextlib.suppress(FileNotFoundError):  # the copy has been evicted
                return read_members(copy, spans)
        with self._tracked(shard.name):
            found = read_ranges(f"{self.location}/{shard.name}", spans, self.config.attempts)
        self._failed_in_a_row.clear()
        return found

    def evict_if_corrupt(self, shard: Shard) -> bool:
        """Check the cached copy of a shard at most once, and remove the copy if it is damaged.

        Returns:
            Whether the copy was removed.
        """
        if self._cache is None or shard.name in self._checked:
            return False
        self._checked.add(shard.name)
        if removed := self._cache.evict_if_corrupt(shard):
            logger.warning("removed a damaged copy of %s/%s from the cache", self.location, shard.name)
        return removed

    def prefetch(self, shard: Shard) -> None:
        """Start copying a remote shard to the cache in a background thread."""
        cache = self._cache
        if cache is None or shard.name in self._prefetching or cache.find(shard) is not None:
            return
        if self._prefetch_queue is None or self._prefetch_queue[0] != os.getpid():  # a fork has no threads
            self._prefetch_queue = os.getpid(), queue.SimpleQueue()
            for _ in range(_MAX_DOWNLOADS):
                # Daemon threads, so that the process can exit during a download.
                threading.Thread(
                    target=self._run_prefetches, args=(cache, self._prefetch_queue[1]), daemon=True
                ).start()
        self._prefetching.add(shard.name)
        self._prefetch_queue[1].put(shard)

    def _run_prefetches(self, cache: ShardCache, prefetch_queue: "queue.SimpleQueue[Shard]") -> None:
        while True:
            shard = prefetch_queue.get()
            try:
                cache.download(shard)
                self._failed_in_a_row.clear()
            except OSError as error:  # members are read with range requests instead
                logger.warning("a shard could not be cached: %s", error)
                time.sleep(_RETRY_AFTER_S / 10)
            self._prefetching.discard(shard.name)

    @contextlib.contextmanager
    def _tracked(self, name: str) -> Iterator[None]:
        """Return a context manager that records a failure to read a file.

        During the next ``_RETRY_AFTER_S`` seconds, reads of the file fail immediately.

        Raises:
            StoreError: The file cannot be read, or an earlier failure was recorded.
            StoreDownError: Several consecutive files could not be read.
        """
        failed_at, message = self._unreadable.get(name, (-math.inf, ""))
        if time.monotonic() < failed_at + _RETRY_AFTER_S:
            raise StoreError(message)
        try:
            yield
        except StoreError as error:
            self._unreadable[name] = time.monotonic(), str(error)
            if not isinstance(error, MissingError):
                self._failed_in_a_row.add(name)
            if len(self._failed_in_a_row) >= _MAX_FAILURES:
                raise StoreDownError(
                    f"{self.location} does not respond: {_MAX_FAILURES} consecutive files could not be read. "
                    f"The last error was: {error}. "
                    "Start the run again when the store is available. The run resumes from the last checkpoint"
                ) from error
            raise

    def _read_file(self, url: str) -> bytes:
        """Read a complete file."""

        def read() -> bytes:
            fs, inner = open_store(url)
            with store_errors(url):
                return fs.cat_file(inner)

        return retry(read, self.config.attempts)
