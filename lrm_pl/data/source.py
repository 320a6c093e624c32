"""The bytes of a folder of shards, wherever it lies: a local folder, or a URL of an object store or a web server.

Locally, members are read by their offsets. At a URL a member is read out of the machine's copy of its shard where
there is one (``lrm_pl.data.cache``), else alone, by its range; threads bring the shards that are needed next. So the
first step waits for a few members, not for whole shards.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
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

#: Shards that a process brings at the same time.
_TRANSFERS = 2

#: Files in a row that a store does not give before it is taken for down.
_DOWN = 4

#: Seconds after which a shard that could not be read is asked for again.
_REST_S = 300.0


class ShardSource:
    """Reads what is in a folder of shards.

    Args:
        location: A local folder or a URL (``s3://``, ``gs://``, ``https://``).
        cache: How shards at a URL are read.

    Raises:
        InputError: The package that reads such a URL is not installed.
    """

    def __init__(self, location: str, cache: CacheConfig = CacheConfig()) -> None:  # noqa: B008 - frozen
        self.local = is_local(location)
        self.location = (os.path.expanduser(location) if self.local else location).rstrip("/")
        self.config = cache
        self._cache = None if self.local or not cache.gigabytes else ShardCache(self.location, cache)
        self._lost: dict[str, tuple[float, str]] = {}  # file -> when it could not be read, and why
        self._in_a_row: set[str] = set()  # files that the store did not give since it last gave one
        self._coming: set[str] = set()
        self._doubted: set[str] = set()
        self._errands: tuple[int, queue.SimpleQueue[Shard]] | None = None

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            ShardError: There is none, or it is no manifest.
            StoreError: The store does not answer.
        """
        if self.local:
            return read_manifest(Path(self.location))
        where = f"{self.location}/{MANIFEST_NAME}"
        try:
            return parse_manifest(self._small(where), where)
        except MissingError as error:
            raise ShardError(
                expected=f"finished shards at {self.location}",
                found=f"no {MANIFEST_NAME}: {error}",
                remedy="copy the whole folder of shards there",
            ) from error

    def index(self, shard: Shard) -> MemberIndex:
        """Read where the members of a shard are.

        Raises:
            ShardError: The index does not fit the shard.
            StoreError: The store does not answer.
        """
        if self.local:
            return read_index(Path(self.location), shard)
        where = f"{self.location}/{shard.index_name}"
        self._require_not_lost(shard.index_name)
        try:
            return parse_index(self._small(where), where, shard)
        except StoreError as error:
            self._lose(shard.index_name, error)
            raise

    def read(self, shard: Shard, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read members.

        Args:
            shard: The shard.
            spans: (offset, size) of each member.

        Raises:
            SampleError: The shard is truncated.
            OSError: It cannot be read; a ``StoreError`` at a URL.
            StoreDownError: Nor can many others.
        """
        if self.local:
            return read_members(Path(self.location) / shard.name, spans)
        if self._cache is not None and (copy := self._cache.find(shard)) is not None:
            try:
                return read_members(copy, spans)
            except FileNotFoundError:  # it has just been removed for another shard
                pass
        self._require_not_lost(shard.name)
        try:
            found = read_ranges(f"{self.location}/{shard.name}", spans, self.config.attempts)
        except StoreError as error:
            self._lose(shard.name, error)
            raise
        self._in_a_row.clear()
        return found

    def evict_if_corrupt(self, shard: Shard) -> bool:
        """Look once whether something bad that was read is this machine's copy's fault; such a copy is removed."""
        if self._cache is None or shard.name in self._doubted:
            return False
        self._doubted.add(shard.name)
        removed = self._cache.evict_if_corrupt(shard)
        if removed:
            logger.warning("removed a damaged copy of %s/%s", self.location, shard.name)
        return removed

    def prefetch(self, shard: Shard) -> None:
        """Have a shard brought that is needed soon; returns at once."""
        cache = self._cache
        if cache is None or shard.name in self._coming or cache.find(shard) is not None:
            return
        if self._errands is None or self._errands[0] != os.getpid():  # threads are left behind by a fork
            self._errands = os.getpid(), queue.SimpleQueue()
            for _ in range(_TRANSFERS):
                # Daemons: a process that ends does not wait for a shard.
                threading.Thread(
                    target=self._run_errands, args=(cache, self._errands[1]), daemon=True
                ).start()
        self._coming.add(shard.name)
        self._errands[1].put(shard)

    def _run_errands(self, cache: ShardCache, errands: "queue.SimpleQueue[Shard]") -> None:
        while True:
            shard = errands.get()
            try:
                cache.bring(shard)
                self._in_a_row.clear()
            except OSError as error:  # members are read alone then, and say what is wrong with theirs
                logger.warning("not copied: %s", error)
                time.sleep(_REST_S / 10)
            self._coming.discard(shard.name)

    def _lose(self, name: str, error: StoreError) -> None:
        """Keep in mind that a file cannot be read: else each of its samples would be waited for in vain.

        Raises:
            StoreDownError: It is one of many in a row; to go through all the others would take hours.
        """
        self._lost[name] = time.monotonic(), str(error)
        if isinstance(error, MissingError):
            return
        self._in_a_row.add(name)
        if len(self._in_a_row) >= _DOWN:
            raise StoreDownError(
                expected=f"{self.location} to answer",
                found=f"that {_DOWN} files in a row could not be read, the last: {error}",
                remedy="start the run again when the store is available: it resumes",
            ) from error

    def _require_not_lost(self, name: str) -> None:
        when, why = self._lost.get(name, (-_REST_S, ""))
        if why and time.monotonic() < when + _REST_S:
            raise StoreError(why)

    def _small(self, url: str) -> bytes:
        """Read a whole small file."""

        def read() -> bytes:
            fs, inner = open_store(url)
            with store_errors(url):
                return fs.cat_file(inner)

        return retry(read, self.config.attempts)
