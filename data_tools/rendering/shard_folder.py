"""Files in a folder of shards that is not complete, from which an interrupted run is resumed.

    OUT/plan.parquet                 assignment of objects to shards (see ``resume``)
    OUT/parts/<id>.tar               a part, which is a rendered object whose shard is not complete
    OUT/failures.jsonl               {"id", "file", "reason"} of objects that could not be rendered
    OUT/quarantine/<id>.log          output of Blender for an object that could not be rendered
    OUT/train-000000.tar             a shard, which is written when all objects of the shard are rendered or failed
    OUT/rejected-train-000000.tar    objects of the shard that violate a rule
    OUT/manifest.json                the manifest, which is written last

If ``failures.jsonl`` is deleted, the next run retries the failed objects. The temporary names of files that are not
complete contain ``.partial``.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.assets.asset_list import Asset
from data_tools.quality.filter_table import read_infos
from data_tools.quality.measures import MEASURES_MEMBER, Rule, broken_rules, decode_measures
from data_tools.rendering.shard_plan import PlannedShard
from lrm_pl.data.manifest import MANIFEST_NAME, Shard, read_index, read_members, write_atomically
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


class FolderError(InputError):
    """Raised if a folder of shards or its disk cannot be used, or if no object can be rendered."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder of shards.

    Args:
        folder: Folder of shards.

    Raises:
        FolderError: A different process has locked the folder.
    """
    with open(folder / ".lock", "w") as file:
        give_up = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                lock(file, wait=False)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise FolderError(
                        subject=folder,
                        expected="no other process that renders into this folder",
                        found="one",
                        remedy="wait until it has finished, or stop it",
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


def write_quarantine(folder: Path, key: str, log: str) -> None:
    """Write the output of Blender for an object that could not be rendered."""
    (folder / QUARANTINE_NAME).mkdir(exist_ok=True)
    write_atomically(folder / QUARANTINE_NAME / f"{key}.log", log.encode())


def part_ids(folder: Path) -> set[str]:
    """Return the ids of all parts."""
    return {path.stem for path in (folder / PARTS_NAME).glob("*.tar")}


def read_failures(folder: Path) -> dict[str, dict[str, str]]:
    """Return a mapping from ids to the records in ``failures.jsonl``.

    Raises:
        FolderError: A line is not a valid record.
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
            raise FolderError(
                subject=f"{path}, line {number}",
                expected="a record with id, file and reason",
                found=f"{line[:60]!r}",
                remedy="delete the line. The object is then rendered again",
            ) from error
    return records


def write_failures(path: Path, failures: dict[str, dict[str, str]]) -> None:
    """Write ``failures.jsonl``, sorted by id. Characters that cannot be encoded in UTF-8 are escaped."""
    if failures or path.is_file():
        write_atomically(path, b"".join(_line(failures[key]) for key in sorted(failures)))


def add_failure(path: Path, record: dict[str, str]) -> None:
    """Append a record to ``failures.jsonl``."""
    with open(path, "ab") as file:
        file.write(_line(record))


def _line(record: dict[str, str]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def find_records(folder: Path, planned: PlannedShard) -> dict[str, tuple[Path, SampleInfo]]:
    """Find the rendered objects of a shard.

    Args:
        folder: Folder of shards.
        planned: Shard whose objects are searched.

    Returns:
        Mapping from ids to tuples (path, record), where the path is the tar file that contains the object.

    Raises:
        InputError: A shard or a record is damaged.
    """
    tars = [folder / name for name, _ in _names(planned)]
    tars += [folder / PARTS_NAME / f"{key}.tar" for key in planned.ids]
    found = dict[str, tuple[Path, SampleInfo]]()
    for tar in tars:
        shard = _shard(tar, planned)
        infos = read_infos(tar.parent, shard) if shard else ()
        found |= {key: (tar, info) for key, info in infos if key not in found}
    return found


def check_recorded_hashes(
    folder: Path,
    planned: PlannedShard,
    assets: Mapping[str, Asset],
    known: Mapping[str, Shard],
    before_ns: int,
) -> None:
    """Verify the files of a shard that will be hashed again, so that no hash of a damaged file is recorded.

    Args:
        folder: Folder of shards.
        planned: Shard to verify.
        assets: Mapping from ids to assets.
        known: Mapping from names to shards in the previous manifest.
        before_ns: Modification time of the previous manifest in nanoseconds.

    Raises:
        FolderError: A file does not have the hash in the previous manifest.
    """
    paths = [folder / name for name, _ in _names(planned) if name in known and (folder / name).is_file()]
    is_rewritten = bool(_changed_records(folder, planned, assets))
    for path in paths:
        shard = known[path.name]
        if (is_rewritten or not _is_unchanged(path, shard, before_ns)) and hash_file(path) != shard.sha256:
            raise FolderError(
                subject=path,
                expected=f"the sha256 {shard.sha256} of the manifest",
                found="another one",
                remedy=(
                    f"the file is damaged. Delete it and {folder / MANIFEST_NAME}, then run the same command to render "
                    "its objects again"
                ),
            )


def _changed_records(
    folder: Path, planned: PlannedShard, assets: Mapping[str, Asset]
) -> dict[str, SampleInfo]:
    return {
        key: info
        for key, (_, info) in find_records(folder, planned).items()
        if key in assets and info != _with_listed(info, assets[key])
    }


def _is_unchanged(path: Path, shard: Shard, before_ns: int) -> bool:
    """Return whether a file has the size in the manifest and is older than the manifest."""
    stat = path.stat()
    return shard.bytes == stat.st_size and stat.st_mtime_ns < before_ns


def update_records(
    folder: Path, planned: PlannedShard, assets: Mapping[str, Asset], rules: Sequence[Rule]
) -> int:
    """Update the names, licenses, creators and sources in a shard according to the asset list.

    Args:
        folder: Folder of shards.
        planned: Shard to update.
        assets: Mapping from ids to assets.
        rules: Rules that objects must satisfy.

    Returns:
        Number of updated records.
    """
    changed = _changed_records(folder, planned, assets)
    if changed:

        def update(key: str, members: dict[str, bytes]) -> dict[str, bytes]:
            if key not in changed:
                return members
            return members | {INFO_MEMBER: encode_info(_with_listed(changed[key], assets[key]))}

        _split_into_parts(folder, planned, update)
        write_planned_shard(folder, planned, rules)
    return len(changed)


def _with_listed(info: SampleInfo, asset: Asset) -> SampleInfo:
    return dataclasses.replace(info, **asset.record())


def describe_shards(
    folder: Path, planned: PlannedShard, known: Mapping[str, Shard], before_ns: int
) -> list[Shard]:
    """Return the manifest entries of the files of a planned shard.

    There is one file for accepted objects and one file for rejected objects. A file without objects does not exist.

    Args:
        folder: Folder of shards.
        planned: Shard to describe.
        known: Mapping from names to shards in the previous manifest.
        before_ns: Modification time of the previous manifest in nanoseconds. Older files are not hashed again if they
            have the size in the manifest.
    """
    found = []
    for name, rejected in _names(planned):
        shard = _shard(folder / name, planned)
        if shard is None:
            continue
        previous = known.get(name)
        unchanged = previous and _is_unchanged(folder / name, previous, before_ns)
        sha256 = previous.sha256 if previous and unchanged else hash_file(folder / name)
        found.append(dataclasses.replace(shard, sha256=sha256, rejected=rejected))
    return found


def shard_ids(folder: Path, planned: PlannedShard) -> set[str]:
    """Return the ids of the objects in the files of a planned shard, according to the indices.

    Raises:
        lrm_pl.data.manifest.ShardError: An index is invalid.
    """
    shards = (_shard(folder / name, planned) for name, _ in _names(planned))
    return {key for shard in shards if shard for key in read_index(folder, shard)}


def finished_ids(folder: Path, plan: Sequence[PlannedShard], failed: set[str]) -> set[str]:
    """Return the ids of all objects that have been rendered into shards or parts.

    If an object is missing from a shard and not recorded as failed, for example because ``failures.jsonl`` was deleted,
    the shard is split into parts. It is written again when the missing object has been rendered.

    Args:
        folder: Folder of shards.
        plan: All shards.
        failed: Ids of objects that are recorded as failed.
    """
    done = part_ids(folder)
    for planned in plan:
        ids = shard_ids(folder, planned)
        if not ids:
            continue
        if all(key in ids or key in failed for key in planned.ids):
            _drop_parts(folder, planned)
        else:
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            _split_into_parts(folder, planned)
        done |= ids
    return done


def write_planned_shard(folder: Path, planned: PlannedShard, rules: Sequence[Rule]) -> None:
    """Write the files of a planned shard from the parts. A file without objects is not written.

    Args:
        folder: Folder of shards.
        planned: Shard to write.
        rules: Rules that objects must satisfy. Objects that violate a rule are written to a separate file.
    """
    have = part_ids(folder)
    chosen = dict[bool, list[str]]({False: [], True: []})
    for key in (key for key in planned.ids if key in have):
        for _, members in _read_tar(folder / PARTS_NAME / f"{key}.tar"):
            rejected = bool(broken_rules(decode_measures(key, members[MEASURES_MEMBER]), rules))
            chosen[rejected].append(key)
    for name, rejected in _names(planned):
        if keys := chosen[rejected]:
            samples = (sample for key in keys for sample in _read_tar(folder / PARTS_NAME / f"{key}.tar"))
            write_shard(folder, name, planned.split, samples, rejected=rejected)
    _drop_parts(folder, planned)


def _names(planned: PlannedShard) -> tuple[tuple[str, bool], ...]:
    """Return a tuple (name, rejected) for each file of a planned shard."""
    return (planned.name, False), (f"rejected-{planned.name}", True)


def _shard(tar: Path, planned: PlannedShard) -> Shard | None:
    """Return the manifest entry of a tar file without a hash, or None if the tar file or the index is missing."""
    index = tar.with_name(tar.stem + ".index.json")
    if not tar.is_file() or not index.is_file():
        return None
    return Shard(tar.name, planned.split, len(json.loads(index.read_bytes())), tar.stat().st_size, "")


def _split_into_parts(
    folder: Path,
    planned: PlannedShard,
    change: Callable[[str, dict[str, bytes]], dict[str, bytes]] = lambda _, members: members,
) -> None:
    """Split a shard into parts. No object is lost if this operation is interrupted.

    Args:
        folder: Folder of shards.
        planned: Shard to split.
        change: Function that maps the id and the members of an object to the members of the part.
    """
    for name in (name for name, _ in _names(planned) if (folder / name).is_file()):
        for key, members in _read_tar(folder / name):
            write_shard(folder / PARTS_NAME, f"{key}.tar", planned.split, [(key, change(key, members))])
        (folder / name).unlink()


def no_space_error(folder: Path, needed: int) -> FolderError:
    """Return the exception for a full disk.

    Args:
        folder: Folder on the disk.
        needed: Required space in bytes.
    """
    free = shutil.disk_usage(folder).free
    return FolderError(
        subject=folder,
        expected=f"about {needed / 1e6:.1f} MB of free disk space",
        found=f"{free / 1e6:.1f} MB",
        remedy="free some space, then run the same command again to resume",
    )


def _drop_parts(folder: Path, planned: PlannedShard) -> None:
    for key in planned.ids:
        for suffix in (".tar", ".index.json"):
            (folder / PARTS_NAME / (key + suffix)).unlink(missing_ok=True)


def _read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield (key, members) for the samples of a tar file in order, where members is a mapping from names to bytes."""
    for key, members in scan_tar(path).items():
        yield key, dict(zip(members, read_members(path, members.values()), strict=True))
