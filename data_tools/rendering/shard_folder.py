"""The state of an unfinished folder of shards, all of it on disk, so that a killed run goes on where it was.

    OUT/parts/<id>.tar     one finished object, until its shard is written
    OUT/failures.jsonl     {"id", "file", "reason"}: left-out objects; delete it to have them tried again
    OUT/quarantine/<id>.log    what Blender printed about them
    OUT/train-000000.tar   written when all its objects are finished or failed; its parts are removed
    OUT/rejected-train-000000.tar    those of its objects that a rule rejected
    OUT/plan.parquet       which object belongs in which shard (``continuation``)
    OUT/manifest.json      written last

Every file is written beside its place and renamed when whole: a name without ``.partial`` is a whole file.
"""

import dataclasses
import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.assets.asset_list import Asset, hash_file
from data_tools.quality.filter_table import read_infos
from data_tools.quality.measures import MEASURES_MEMBER, Rule, broken_rules, decode_measures
from data_tools.rendering.shard_plan import PlannedShard
from lrm_pl.data.manifest import MANIFEST_NAME, Shard, read_index, write_atomically
from lrm_pl.data.schema import INFO_MEMBER, SampleInfo, encode_info
from lrm_pl.data.tar import write_shard
from lrm_pl.errors import InputError
from lrm_pl.locks import lock

FAILURES_NAME = "failures.jsonl"
PARTS_NAME = "parts"
QUARANTINE_NAME = "quarantine"

#: Seconds to wait for a run that was killed a moment ago.
LOCK_TIMEOUT_S = 30.0


class FolderError(InputError):
    """The folder of shards cannot be worked on; the message says what to do."""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for one run.

    Raises:
        FolderError: Another run is at work there.
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
                        expected="no other rendering at work there",
                        found="one",
                        remedy="wait for it or stop it",
                    ) from None
                time.sleep(0.1)
        yield


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    (folder / PARTS_NAME).mkdir(exist_ok=True)
    for place in (folder, folder / PARTS_NAME):
        for path in place.glob("*.partial"):
            path.unlink()


def write_part(folder: Path, key: str, members: Mapping[str, bytes]) -> None:
    """Keep one finished object, members as from ``schema.encode_sample``, until its shard is written."""
    write_shard(folder / PARTS_NAME, f"{key}.tar", "train", [(key, members)])
    (folder / QUARANTINE_NAME / f"{key}.log").unlink(missing_ok=True)


def write_quarantine(folder: Path, key: str, log: str) -> None:
    """Keep what Blender printed about an object that failed."""
    (folder / QUARANTINE_NAME).mkdir(exist_ok=True)
    write_atomically(folder / QUARANTINE_NAME / f"{key}.log", log.encode())


def part_ids(folder: Path) -> set[str]:
    """List the ids that have a finished part."""
    return {path.stem for path in (folder / PARTS_NAME).glob("*.tar")}


def read_failures(folder: Path) -> dict[str, dict[str, str]]:
    """Read ``failures.jsonl``: id -> record.

    Raises:
        FolderError: A line is no record of an object that failed.
    """
    path = folder / FAILURES_NAME
    if not path.is_file():
        return {}
    *lines, _ = path.read_bytes().split(b"\n")  # after the last line's end is what a killed run wrote
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
                remedy="delete the line: an object without one is tried again",
            ) from error
    return records


def write_failures(path: Path, failures: dict[str, dict[str, str]]) -> None:
    """Write a ``failures.jsonl``, sorted by id; what UTF-8 cannot hold is escaped, as JSON does."""
    if failures or path.is_file():
        write_atomically(path, b"".join(_line(failures[key]) for key in sorted(failures)))


def add_failure(path: Path, record: dict[str, str]) -> None:
    """Add a line to a ``failures.jsonl``: however many there are, one more costs as much."""
    with open(path, "ab") as file:
        file.write(_line(record))


def _line(record: dict[str, str]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def find_records(folder: Path, planned: PlannedShard) -> dict[str, tuple[Path, SampleInfo]]:
    """Find the objects of a planned shard that are rendered: id -> the file that holds it, and its record.

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
    """Check shards of a finished folder that will be hashed anew: the new hash would vouch for a damaged file.

    Args:
        folder: Folder of shards.
        planned: The shard.
        assets: Id -> asset.
        known: Name -> shard, as the manifest has it.
        before_ns: When the manifest was written.

    Raises:
        FolderError: A file has another hash than in the manifest.
    """
    paths = [folder / name for name, _ in _names(planned) if name in known and (folder / name).is_file()]
    is_rewritten = bool(_changed_records(folder, planned, assets))
    for path in paths:
        shard = known[path.name]
        if (is_rewritten or not _is_unchanged(path, shard, before_ns)) and hash_file(path) != shard.sha256:
            raise FolderError(
                subject=path,
                expected=f"sha256 {shard.sha256} as in the manifest",
                found="another: it is damaged",
                remedy=(
                    f"delete it and {folder / MANIFEST_NAME}, and run the same command: its objects are "
                    "rendered again"
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
    """Say whether a file is of its size, and older than the manifest that records it."""
    stat = path.stat()
    return shard.bytes == stat.st_size and stat.st_mtime_ns < before_ns


def update_records(
    folder: Path, planned: PlannedShard, assets: Mapping[str, Asset], rules: Sequence[Rule]
) -> int:
    """Make the records in a shard say what is listed of its objects now; nothing is rendered.

    Args:
        folder: Folder of shards.
        planned: The shard.
        assets: Id -> asset.
        rules: Rules that chose.

    Returns:
        How many records were others.
    """
    changed = _changed_records(folder, planned, assets)
    if changed:

        def update(key: str, members: dict[str, bytes]) -> dict[str, bytes]:
            if key not in changed:
                return members
            return members | {INFO_MEMBER: encode_info(_with_listed(changed[key], assets[key]))}

        _take_apart(folder, planned, update)
        write_planned_shard(folder, planned, rules)
    return len(changed)


def _with_listed(info: SampleInfo, asset: Asset) -> SampleInfo:
    return dataclasses.replace(info, **asset.record())


def describe_shards(
    folder: Path, planned: PlannedShard, known: Mapping[str, Shard], before_ns: int
) -> list[Shard]:
    """Describe the shards on disk that a planned one became: itself, and the rejected ones.

    Args:
        folder: Folder of shards.
        planned: The shard.
        known: Name -> shard, as the folder's last manifest had it.
        before_ns: When that manifest was written; what is older, and of its size, need not be hashed again.

    Raises:
        lrm_pl.data.manifest.ShardError: Tar and index do not fit each other.
    """
    found = []
    for name, rejected in _names(planned):
        shard = _shard(folder / name, planned)
        if shard is None:
            continue
        then = known.get(name)
        if then and _is_unchanged(folder / name, then, before_ns):
            sha256 = then.sha256
        else:
            sha256 = hash_file(folder / name)
        found.append(dataclasses.replace(shard, sha256=sha256, rejected=rejected))
    return found


def shard_ids(folder: Path, planned: PlannedShard) -> set[str]:
    """List the objects of a planned shard that are in shards on disk, without reading the tars.

    Raises:
        lrm_pl.data.manifest.ShardError: Tar and index do not fit each other.
    """
    shards = (_shard(folder / name, planned) for name, _ in _names(planned))
    return {key for shard in shards if shard for key in read_index(folder, shard)}


def finished_ids(folder: Path, plan: Sequence[PlannedShard], failed: set[str]) -> set[str]:
    """List the ids that need no rendering, in shards or as parts.

    A shard with a hole that is no longer a known failure (somebody deleted ``failures.jsonl``) is taken apart
    into parts, so that it is written again when the hole is filled.
    """
    done = part_ids(folder)
    for planned in plan:
        ids = shard_ids(folder, planned)
        if not ids:
            continue
        if all(key in ids or key in failed for key in planned.ids):
            _drop_parts(folder, planned)
        else:
            (folder / MANIFEST_NAME).unlink(missing_ok=True)  # it names the shard
            _take_apart(folder, planned)
        done |= ids
    return done


def write_planned_shard(folder: Path, planned: PlannedShard, rules: Sequence[Rule]) -> None:
    """Join the parts of a shard whose objects are all finished or failed; an empty shard is not written.

    Args:
        folder: Folder of shards.
        planned: The shard.
        rules: What an object must obey; the others go into a shard of their own.
    """
    have = part_ids(folder)
    chosen = dict[bool, list[tuple[str, dict[str, bytes]]]]({False: [], True: []})
    for key in (key for key in planned.ids if key in have):
        for _, members in _read_tar(folder / PARTS_NAME / f"{key}.tar"):
            rejected = bool(broken_rules(decode_measures(key, members[MEASURES_MEMBER]), rules))
            chosen[rejected].append((key, members))
    for name, rejected in _names(planned):
        if chosen[rejected]:
            write_shard(folder, name, planned.split, chosen[rejected], rejected=rejected)
    _drop_parts(folder, planned)


def _names(planned: PlannedShard) -> tuple[tuple[str, bool], ...]:
    """Name the files that a planned shard becomes, and say which holds the rejected objects."""
    return (planned.name, False), (f"rejected-{planned.name}", True)


def _shard(tar: Path, planned: PlannedShard) -> Shard | None:
    """Describe a tar that is there with its index, but for its hash and whether it was rejected."""
    index = tar.with_name(tar.stem + ".index.json")
    if not tar.is_file() or not index.is_file():
        return None
    return Shard(tar.name, planned.split, len(json.loads(index.read_bytes())), tar.stat().st_size, "")


def _take_apart(
    folder: Path,
    planned: PlannedShard,
    change: Callable[[str, dict[str, bytes]], dict[str, bytes]] = lambda _, members: members,
) -> None:
    """Turn a shard into parts again; a kill at any moment loses nothing of it."""
    for name in (name for name, _ in _names(planned) if (folder / name).is_file()):
        for key, members in _read_tar(folder / name):
            write_shard(folder / PARTS_NAME, f"{key}.tar", planned.split, [(key, change(key, members))])
        (folder / name).unlink()


def no_space_message(folder: Path, needed: int) -> str:
    """Say that the disk is full: expected, found, remedy."""
    free = shutil.disk_usage(folder).free
    return (
        f"{folder}: expected about {needed / 1e6:.1f} MB of free disk space for the rest, but found "
        f"{free / 1e6:.1f} MB; free some space and run the same command again, it goes on where it was"
    )


def _drop_parts(folder: Path, planned: PlannedShard) -> None:
    for key in planned.ids:
        for suffix in (".tar", ".index.json"):
            (folder / PARTS_NAME / (key + suffix)).unlink(missing_ok=True)


def _read_tar(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Read a tar that this package wrote: [(key, member -> bytes)] in order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path, "r:") as tar:
        for header in tar:
            key, member = header.name.split(".", 1)
            file = tar.extractfile(header)
            assert file is not None, header.name
            samples.setdefault(key, {})[member] = file.read()
    return list(samples.items())
