"""Files in an incomplete folder of shards, from which an interrupted run is resumed.

    OUT/plan.parquet                 assignment of objects to shards (see ``resume``)
    OUT/parts/<id>.tar               a part, which is a rendered object whose shard is not complete
    OUT/failures.jsonl               {"id", "file", "reason"} of objects that could not be rendered
    OUT/quarantine/<id>.log          output of Blender for an object that could not be rendered
    OUT/train-000000.tar             a shard, which is written when all objects of the shard are rendered or failed
    OUT/rejected-train-000000.tar    objects of the shard that violate a rule
    OUT/manifest.json                the manifest, which is written last

If ``failures.jsonl`` is deleted, the next run retries the failed objects. The names of incomplete files contain
``.partial``.
"""

import dataclasses
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.assets.asset_list import Asset
from data_tools.quality.filter_table import read_infos
from data_tools.quality.measures import MEASURES_MEMBER, Rule, broken_rules, decode_measures
from data_tools.rendering.shard_plan import PlannedShard
from lrm_pl.data.manifest import (
    MANIFEST_NAME,
    Shard,
    read_index,
    read_manifest,
    read_members,
    write_atomically,
)
from lrm_pl.data.schema import INFO_MEMBER, SampleInfo, encode_info
from lrm_pl.data.tar import scan_tar, write_shard
from lrm_pl.errors import InputError
from lrm_pl.locks import lock
from lrm_pl.paths import hash_file

FAILURES_NAME = "failures.jsonl"
PARTS_NAME = "parts"
QUARANTINE_NAME = "quarantine"

#: Maximum time to wait for the lock in seconds. A run that has been killed can hold the lock for a short time.
LOCK_TIMEOUT_S = 30.0


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder of shards.

    Args:
        folder: Folder of shards.

    Raises:
        InputError: A different process has locked the folder.
    """
    with open(folder / ".lock", "w") as file:
        give_up = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                lock(file, wait=False)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise InputError(
                        subject=folder,
                        expected="no other process that renders into this folder",
                        found="a running process",
                        remedy="wait until the other process has finished, or stop the process",
                    ) from None
                time.sleep(0.1)
        yield


def remove_partial_files(folder: Path) -> None:
    """Remove the incomplete files of an interrupted run."""
    (folder / PARTS_NAME).mkdir(exist_ok=True)
    for path in [*folder.glob("*.partial"), *(folder / PARTS_NAME).glob("*.partial")]:
        path.unlink()


def write_part(folder: Path, key: str, members: Mapping[str, bytes]) -> None:
    """Write a rendered object as a part.

    Args:
        folder: Folder of shards.
        key: Id of the object.
        members: Members of the sample, from ``schema.encode_sample``.
    """
    write_shard(folder / PARTS_NAME, f"{key}.tar", "train", [(key, members)])
    (folder / QUARANTINE_NAME / f"{key}.log").unlink(missing_ok=True)


def part_ids(folder: Path) -> set[str]:
    """Return the ids of all parts."""
    return {path.stem for path in (folder / PARTS_NAME).glob("*.tar")}


def read_failures(folder: Path) -> dict[str, dict[str, str]]:
    """Return a mapping from ids to the records in ``failures.jsonl``.

    Raises:
        InputError: A line is not a valid record.
    """
    path = folder / FAILURES_NAME
    if not path.is_file():
        return {}
    *lines, _ = path.read_bytes().split(b"\n")  # an interrupted run can leave an incomplete last line
    records = dict[str, dict[str, str]]()
    for number, line in enumerate(lines, 1):
        try:
            if line:
                record = json.loads(line)
                records[record["id"]] = {name: str(record[name]) for name in ("id", "file", "reason")}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                subject=f"{path}, line {number}",
                expected="a record with id, file and reason",
                found=f"{line[:60]!r}",
                remedy="delete this line of the file. The object is then rendered again",
            ) from error
    return records


def write_failures(path: Path, failures: dict[str, dict[str, str]]) -> None:
    """Write ``failures.jsonl``, sorted by id. Characters that cannot be encoded in UTF-8 are escaped."""
    if failures or path.is_file():
        write_atomically(path, b"".join(_line(failures[key]) for key in sorted(failures)))


def add_failure(folder: Path, record: dict[str, str], log: str) -> None:
    """Append a record to ``failures.jsonl``, and write the output of Blender to the folder ``quarantine``."""
    (folder / QUARANTINE_NAME).mkdir(exist_ok=True)
    output = f"{record['reason']}\n\n{log}".encode("utf-8", "backslashreplace")
    write_atomically(folder / QUARANTINE_NAME / f"{record['id']}.log", output)
    with open(folder / FAILURES_NAME, "ab") as file:
        file.write(_line(record))


def _line(record: dict[str, str]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def find_records(folder: Path, planned: PlannedShard) -> dict[str, tuple[Path, SampleInfo]]:
    """Find the rendered objects of a shard.

    Args:
        folder: Folder of shards.
        planned: Shard to search for objects.

    Returns:
        Mapping from ids to tuples (path, record), where the path is the tar file that contains the object.

    Raises:
        InputError: A shard or a record is damaged.
    """
    tars = [folder / name for name in _names(planned)]
    tars += [folder / PARTS_NAME / f"{key}.tar" for key in planned.ids]
    found = dict[str, tuple[Path, SampleInfo]]()
    for tar in tars:
        shard = _shard(tar, planned)
        infos = read_infos(tar.parent, shard) if shard else ()
        found |= {key: (tar, info) for key, info in infos if key not in found}
    return found


class PreviousShards:
    """Shards in the manifest of the previous run.

    Args:
        folder: Folder of shards.

    Attributes:
        manifest: Manifest of the previous run, or None if there is none.
        shards: Mapping from shard names to manifest entries.

    Raises:
        lrm_pl.data.manifest.ShardError: The manifest is invalid, or a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / MANIFEST_NAME
        self.manifest = read_manifest(folder) if path.is_file() else None
        self.shards = {shard.name: shard for shard in self.manifest.shards} if self.manifest else {}
        self._written_ns = path.stat().st_mtime_ns if self.manifest else 0

    def sha256(self, path: Path) -> str:
        """Return the hash of a shard. A file unchanged since the manifest was written is not hashed again."""
        shard, stat = self.shards.get(path.name), path.stat()
        if shard and shard.bytes == stat.st_size and stat.st_mtime_ns < self._written_ns:
            return shard.sha256
        return hash_file(path)


def find_changed_records(
    folder: Path, planned: PlannedShard, assets: Mapping[str, Asset], previous: PreviousShards
) -> dict[str, dict[str, bytes]]:
    """Find objects whose name, license, creator or source differs from the asset list.

    Files that will be hashed again are verified first, so that the hash of a damaged file is never recorded.

    Args:
        folder: Folder of shards.
        planned: Shard whose objects are compared.
        assets: Mapping from ids to assets. If it is empty, no records are read.
        previous: Shards in the previous manifest.

    Returns:
        Mapping from ids to the changed members of the sample.

    Raises:
        InputError: The hash of a file differs from the hash in the previous manifest.
    """
    changed = {}
    for key, (_, info) in find_records(folder, planned).items() if assets else ():
        if key in assets and info != (listed := dataclasses.replace(info, **assets[key].record())):
            changed[key] = {INFO_MEMBER: encode_info(listed)}
    for path in (folder / name for name in _names(planned)):
        recorded = previous.shards.get(path.name)
        if not recorded or not path.is_file():
            continue
        if (hash_file(path) if changed else previous.sha256(path)) != recorded.sha256:
            raise InputError(
                subject=path,
                expected=f"the sha256 {recorded.sha256} in the manifest",
                found="a different sha256",
                remedy=f"delete the damaged file and {folder / MANIFEST_NAME}, then run the same command again",
            )
    return changed


def shard_ids(folder: Path, planned: PlannedShard) -> set[str]:
    """Return the ids of the objects in the files of a planned shard, according to the indices.

    Raises:
        lrm_pl.data.manifest.ShardError: An index is invalid.
    """
    shards = (_shard(folder / name, planned) for name in _names(planned))
    return {key for shard in shards if shard for key in read_index(folder, shard)}


def reopen_shard(
    folder: Path, planned: PlannedShard, changed: Mapping[str, dict[str, bytes]], failed: Collection[str]
) -> bool:
    """Split a shard into parts if an object is missing or if records have changed.

    An object can be missing if, for example, ``failures.jsonl`` was deleted. No object is lost if this operation is
    interrupted. If the shard is complete and unchanged, its parts are deleted.

    Args:
        folder: Folder of shards.
        planned: Shard to split.
        changed: Mapping from ids to changed members.
        failed: Ids of objects that are recorded as failed.

    Returns:
        Whether the shard must be written. It is False if the shard is complete and unchanged.
    """
    ids = shard_ids(folder, planned)
    if ids and not changed and all(key in ids or key in failed for key in planned.ids):
        _delete_parts(folder, planned)
        return False
    parts = folder / PARTS_NAME
    tars = [folder / name for name in _names(planned)] + [parts / f"{key}.tar" for key in changed]
    for tar in (tar for tar in tars if tar.is_file()):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for key, members in _read_tar(tar):
            write_shard(parts, f"{key}.tar", planned.split, [(key, members | changed.get(key, {}))])
        if tar.parent == folder:
            tar.unlink()
    return True


def write_planned_shard(folder: Path, planned: PlannedShard, rules: Sequence[Rule]) -> None:
    """Write the files of a planned shard from the parts. A file without objects is not written.

    Args:
        folder: Folder of shards.
        planned: Shard to write.
        rules: Rules that objects must satisfy. Objects that violate a rule are written to a separate file.
    """
    parts = [folder / PARTS_NAME / f"{key}.tar" for key in planned.ids]
    chosen: dict[bool, list[Path]] = {False: [], True: []}
    for part in (part for part in parts if part.is_file()):
        for key, members in _read_tar(part):
            chosen[bool(broken_rules(decode_measures(key, members[MEASURES_MEMBER]), rules))].append(part)
    for name, (rejected, paths) in zip(_names(planned), chosen.items(), strict=True):
        if paths:
            samples = (sample for path in paths for sample in _read_tar(path))
            write_shard(folder, name, planned.split, samples, rejected=rejected)
    _delete_parts(folder, planned)


def describe_shards(folder: Path, planned: PlannedShard, previous: PreviousShards) -> list[Shard]:
    """Return the manifest entries of the files of a planned shard.

    Args:
        folder: Folder of shards.
        planned: Shard to describe.
        previous: Shards in the previous manifest.
    """
    shards = (_shard(folder / name, planned) for name in _names(planned))
    return [
        dataclasses.replace(shard, sha256=previous.sha256(folder / shard.name)) for shard in shards if shard
    ]


def _names(planned: PlannedShard) -> tuple[str, str]:
    """Return the names of the files of accepted and of rejected objects. A file without objects does not exist."""
    return planned.name, f"rejected-{planned.name}"


def _shard(tar: Path, planned: PlannedShard) -> Shard | None:
    """Return the manifest entry of a tar file without a hash, or None if the tar file or the index is missing."""
    index = tar.with_name(tar.stem + ".index.json")
    if not tar.is_file() or not index.is_file():
        return None
    samples = len(json.loads(index.read_bytes()))
    return Shard(tar.name, planned.split, samples, tar.stat().st_size, "", tar.name != planned.name)


def _delete_parts(folder: Path, planned: PlannedShard) -> None:
    for key in planned.ids:
        for suffix in (".tar", ".index.json"):
            (folder / PARTS_NAME / (key + suffix)).unlink(missing_ok=True)


def _read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, members) for the samples of a tar file in order, where members is a mapping from names to bytes."""
    for key, members in scan_tar(path).items():
        yield key, dict(zip(members, read_members(path, members.values()), strict=True))
