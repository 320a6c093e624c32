"""A bounded folder of copies of remote shards, shared by all processes of a machine.

    FOLDER/<sha256>.tar            a whole shard, verified: a name without ``.partial`` is a whole file
    FOLDER/<sha256>.tar.partial    one that is on its way; nobody reads it
    FOLDER/<sha256>.tar.lock       held by the process that brings it
    FOLDER/lock                    held while space is counted and made

Copies are called by what is in them, so a data set that was made anew never meets its old copies. What was used least
recently goes first; a process that has a file open keeps what is in it.
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
from lrm_pl.storage import StoreError, read_ranges, retry

#: Bytes asked for at a time: what is lost when a transfer breaks off.
_BLOCK = 8 << 20

#: Seconds to wait for space that other processes' transfers hold.
_PATIENCE_S = 600.0


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How shards at a URL are read; of no matter where they lie in a local folder.

    Attributes:
        folder: Where copies of shards are kept, for all processes of a machine; null for "shards" in the cache of
            weights ($LRM_CACHE, else ~/.cache/lrm_pl).
        gigabytes: Most that they take up. 0 keeps no copies: only the views that are used are read, each time.
        attempts: How often a request is made before its sample counts as bad.
        ahead: Samples that a loader worker looks ahead for shards to bring.
    """

    folder: str | None = None
    gigabytes: float = 50.0
    attempts: int = 6
    ahead: int = 64

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.gigabytes < 0 or self.attempts < 1 or self.ahead < 0:
            raise InputError(
                expected="gigabytes and ahead of 0 or more and attempts of 1 or more", found=self
            )

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        ours = os.environ.get("LRM_CACHE")
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (Path(ours).expanduser() if ours else home / "lrm_pl") / "shards"


class ShardCache:
    """The copies of the shards at one URL.

    Args:
        url: Where the shards are.
        config: Folder and limits.
    """

    def __init__(self, url: str, config: CacheConfig) -> None:
        self.url, self.config, self.folder = url.rstrip("/"), config, config.path
        self._limit = int(config.gigabytes * 1e9)

    def find(self, shard: Shard) -> Path | None:
        """Return the copy of a shard; None where there is none, or one that was damaged since."""
        path = self._path(shard)
        try:
            if path.stat().st_size != shard.bytes:
                path.unlink(missing_ok=True)
                return None
            _mark_used(path)
        except FileNotFoundError:
            return None
        return path

    def evict_if_corrupt(self, shard: Shard) -> bool:
        """Hash the copy of a shard in which something bad was read, and remove it if it is not the shard's bytes.

        Returns:
            Whether it was removed: the bad thing is not the shard's then.
        """
        path = self._path(shard)
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    return False
        except FileNotFoundError:
            return False
        path.unlink(missing_ok=True)
        return True

    def bring(self, shard: Shard) -> Path | None:
        """Copy a shard unless it is there, or larger than the whole cache may be; waits for who is at it.

        Raises:
            StoreError: It cannot be had whole.
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
                with open(partial, "rb") as file:  # else a power failure may leave a whole size of nothing
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def _copy(self, shard: Shard, partial: Path) -> None:
        """Write a shard block by block: a block that fails is asked for again, not the whole."""
        url, digest = f"{self.url}/{shard.name}", hashlib.sha256()
        with open(partial, "r+b") as file:
            for start in range(0, shard.bytes, _BLOCK):
                span = (start, min(_BLOCK, shard.bytes - start))
                (block,) = read_ranges(url, [span], self.config.attempts)
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != shard.sha256:
            raise StoreError(subject=url, expected=f"sha256 {shard.sha256}", found=digest.hexdigest())

    def _make_room(self, partial: Path, size: int) -> None:
        """Count what is there, remove what was used least recently, and take up the space.

        Raises:
            StoreError: Other transfers hold it all.
        """
        give_up = time.monotonic() + _PATIENCE_S
        while True:
            with self._locked("lock"):
                partial.unlink(
                    missing_ok=True
                )  # of a process that was killed: nobody else has the shard's lock
                files = dict(self._stats())
                used = sum(stat.st_size for stat in files.values())
                whole = sorted((f for f in files if f.suffix == ".tar"), key=lambda f: files[f].st_mtime_ns)
                for file in whole:
                    if used + size <= self._limit:
                        break
                    file.unlink(missing_ok=True)
                    used -= files[file].st_size
                if used + size <= self._limit:
                    with open(partial, "wb") as empty:
                        empty.truncate(size)
                    return
            if time.monotonic() > give_up:
                raise StoreError(
                    subject=self.folder,
                    expected=f"{size} of {self._limit} bytes for a shard",
                    found="that other transfers hold them",
                    remedy="allow more data.cache.gigabytes",
                )
            time.sleep(0.2)

    def _stats(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Look at the copies; readers remove damaged ones meanwhile, without the lock."""
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()

    def _files(self) -> Iterator[Path]:
        """List whole and partial copies; partial ones that nobody is bringing are removed."""
        for path in self.folder.iterdir():
            if path.suffix == ".partial" and not self._is_locked(
                path.name.removesuffix(".partial") + ".lock"
            ):
                path.unlink(missing_ok=True)
            elif path.suffix in (".tar", ".partial") and path.is_file():
                yield path

    def _is_locked(self, name: str) -> bool:
        with open(self.folder / name, "w") as file:
            try:
                return not lock(file, wait=False)  # where there are no locks, it may be somebody's
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
    """Note the time, to the nanosecond: the system's own marks are thousands of times as coarse."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
