"""A cache of remote shards with a maximum size, shared by all processes on a machine.

    FOLDER/<sha256>.tar            a complete, verified copy of a shard
    FOLDER/<sha256>.tar.partial    a download in progress
    FOLDER/<sha256>.tar.lock       locked by the downloading process
    FOLDER/lock                    locked while space is freed

The name of a copy is the hash of the shard, so copies are not used after a data set is rendered again. The least
recently used copy is evicted first. A process that has an evicted copy open can continue to read it.
"""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lrm_pl.data.manifest import Shard
from lrm_pl.errors import InputError
from lrm_pl.locks import lock
from lrm_pl.paths import cache_folder, hash_file
from lrm_pl.storage import StoreError, read_ranges, retry

#: Number of bytes per range request in a download.
_BLOCK = 8 << 20

#: Maximum time to wait for space that downloads of other processes occupy, in seconds.
_MAX_WAIT_S = 600.0


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Settings for reading shards from a URL. They have no effect on local folders.

    Attributes:
        folder: Folder of the cache. All processes on a machine share it. If None, the cache is the folder ``shards`` in
            ``$LRM_CACHE``, or in ``$XDG_CACHE_HOME/lrm_pl`` (default: ``~/.cache/lrm_pl``) if this variable is not set.
        gigabytes: Maximum size of the cache in gigabytes. If 0, the cache is disabled, and only the required views are
            read with range requests.
        attempts: Maximum number of attempts per request. If all attempts fail, the sample is treated as bad.
        ahead: Number of upcoming samples per loader worker whose shards are prefetched.
    """

    folder: str | None = None
    gigabytes: float = 50.0
    attempts: int = 6
    ahead: int = 64

    def __post_init__(self) -> None:
        """Validate the ranges of the fields."""
        if self.gigabytes < 0 or self.attempts < 1 or self.ahead < 0:
            raise InputError("gigabytes and ahead to be 0 or more, and attempts to be 1 or more", self)

    @property
    def path(self) -> Path:
        """Folder of the cache."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        return cache_folder() / "shards"


class ShardCache:
    """Cached copies of the shards at one URL.

    Args:
        url: URL of the folder of shards.
        config: Settings of the cache.
    """

    def __init__(self, url: str, config: CacheConfig) -> None:
        self.url, self.config, self.folder = url.rstrip("/"), config, config.path
        self._limit = int(config.gigabytes * 1e9)

    def find(self, shard: Shard) -> Path | None:
        """Return the path of the cached copy of a shard, or None. A copy of an unexpected size is removed."""
        path = self._path(shard)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size == shard.bytes:
                _mark_used(path)
                return path
            path.unlink()
        return None

    def evict_if_corrupt(self, shard: Shard) -> bool:
        """Hash the cached copy of a shard, and remove the copy if the hash does not match the manifest.

        Returns:
            Whether the copy was removed.
        """
        path = self._path(shard)
        with contextlib.suppress(FileNotFoundError):
            if hash_file(path) != shard.sha256:
                path.unlink(missing_ok=True)
                return True
        return False

    def download(self, shard: Shard) -> Path | None:
        """Copy a shard to the cache, unless the cache already contains a copy.

        If a different process is downloading the shard, this method waits until the download ends.

        Returns:
            The path of the copy, or None if the shard is larger than the cache.

        Raises:
            StoreError: The shard cannot be read completely, the hash differs from the manifest, or there is no space.
        """
        if shard.bytes > self._limit:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(shard)
        partial = path.with_name(path.name + ".partial")
        with self._locked(path.name + ".lock"):
            if (found := self.find(shard)) is not None:
                return found
            self._make_room(partial, shard.bytes)
            try:
                retry(lambda: self._copy(shard, partial), 2)
                _mark_used(partial)
                with open(partial, "rb") as file:  # a power failure could leave an empty file of full size
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def _copy(self, shard: Shard, partial: Path) -> None:
        """Download a shard in blocks. If a block cannot be read, only this block is requested again."""
        url, digest = f"{self.url}/{shard.name}", hashlib.sha256()
        with open(partial, "r+b") as file:
            for start in range(0, shard.bytes, _BLOCK):
                span = (start, min(_BLOCK, shard.bytes - start))
                (block,) = read_ranges(url, [span], self.config.attempts)
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != shard.sha256:
            raise StoreError(
                subject=url, expected=f"the SHA-256 hash {shard.sha256}", found=digest.hexdigest()
            )

    def _make_room(self, partial: Path, size: int) -> None:
        """Evict the least recently used copies until ``size`` bytes are free, and reserve the space.

        Raises:
            StoreError: Downloads of other processes occupy the space.
        """
        give_up = time.monotonic() + _MAX_WAIT_S
        while True:
            with self._locked("lock"):
                partial.unlink(missing_ok=True)  # left by a killed process
                files = dict(self._copies())
                used = sum(stat.st_size for stat in files.values())
                copies = sorted((f for f in files if f.suffix == ".tar"), key=lambda f: files[f].st_mtime_ns)
                while copies and used + size > self._limit:
                    oldest = copies.pop(0)
                    oldest.unlink(missing_ok=True)
                    used -= files[oldest].st_size
                if used + size <= self._limit:
                    with open(partial, "wb") as empty:
                        empty.truncate(size)
                    return
            if time.monotonic() > give_up:
                raise StoreError(
                    subject=self.folder,
                    expected=f"space for a shard of {size} bytes",
                    found=f"that other downloads occupy all {self._limit} bytes of the cache",
                    remedy="increase data.cache.gigabytes",
                )
            time.sleep(0.2)

    def _copies(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the path and the file status of each copy and each download.

        Downloads of killed processes are removed. Copies that other processes remove are skipped.
        """
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".partial" and not self._is_locked(path.with_suffix(".lock").name):
                    path.unlink()
                elif path.suffix in (".tar", ".partial"):
                    yield path, path.stat()

    def _is_locked(self, name: str) -> bool:
        with open(self.folder / name, "w") as file:
            try:
                return not lock(file, wait=False)  # assume use if the file system does not support locks
            except BlockingIOError:
                return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / name, "w") as file:
            lock(file, wait=True)
            yield

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"


def _mark_used(path: Path) -> None:
    """Set the modification time of a file to the current time, because timestamps of the kernel are less precise."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
