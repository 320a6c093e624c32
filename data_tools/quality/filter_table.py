"""The table ``filter.parquet``, which contains the measures and the outcome of each asset, sorted by id.

The outcome is "kept", "rejected" or "failed".
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from data_tools.assets.asset_list import Asset
from data_tools.quality.measures import MEASURES_MEMBER, Measures, Rule, broken_rules, decode_measures
from lrm_pl.data.manifest import MANIFEST_NAME, Shard, new_file, read_index, read_members
from lrm_pl.data.schema import INFO_MEMBER, SampleInfo, decode_info
from lrm_pl.errors import InputError

FILTER_NAME = "filter.parquet"


_TYPES = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}

_SCHEMA = pyarrow.schema([
    ("id", pyarrow.string()),
    ("outcome", pyarrow.string()),  # "kept", "rejected" or "failed"
    ("reason", pyarrow.string()),
    ("sha256", pyarrow.string()),  # hash of the rendered mesh
    *((field.name, _TYPES[field.type]) for field in dataclasses.fields(Measures)),  # type: ignore[index]
])  # fmt: skip


def write_filter_table(
    out: Path,
    shards: Sequence[Shard],
    assets: Iterable[Asset],
    rules: Sequence[Rule],
    failures: Mapping[str, Mapping[str, str]],
) -> None:
    """Write ``filter.parquet``.

    Args:
        out: Folder of shards.
        shards: All shards, including rejected shards.
        assets: All assets.
        rules: Rules that objects must satisfy.
        failures: Mapping from ids to records of assets that could not be rendered. The measures of these assets are
            null.
    """
    measured = {key: measures for shard in shards for key, measures in read_measures(out, shard)}
    hashes = {key: info.sha256 for shard in shards for key, info in read_infos(out, shard)}
    rows = []
    for asset in assets:
        if measures := measured.get(asset.id):
            reason = broken_rules(measures, rules)
            row = {"outcome": "rejected" if reason else "kept", "reason": reason, "sha256": hashes[asset.id]}
            rows.append({"id": asset.id} | row | dataclasses.asdict(measures))
        else:
            rows.append({"id": asset.id, "outcome": "failed", "reason": failures[asset.id]["reason"]})
    with new_file(out / FILTER_NAME) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA), file)


def count_rejections(out: Path) -> Counter[str]:
    """Count the rejected assets for each measure that violates a rule.

    If there is no ``filter.parquet``, an empty counter is returned.

    Raises:
        InputError: The table is damaged.
    """
    path = out / FILTER_NAME
    if not path.is_file():  # only ``render`` writes this file
        return Counter()
    try:
        table = pyarrow.parquet.read_table(path, columns=["reason"], filters=[("outcome", "==", "rejected")])
        reasons = table["reason"].to_pylist()
        return Counter(part.split()[0] for reason in reasons for part in reason.split("; "))
    except (pyarrow.ArrowException, ValueError, AttributeError, LookupError) as error:
        raise InputError(
            subject=path,
            expected="the outcome of each asset",
            found=error,
            remedy=f"delete {path} and {out / MANIFEST_NAME}, then run `make render-shards OUT={out}`",
        ) from error


def read_measures(folder: Path, shard: Shard) -> Iterator[tuple[str, Measures]]:
    """Yield (id, measures) for each object in a shard. Objects without measures are skipped.

    Raises:
        InputError: The index does not match the tar file, or measures are invalid.
    """
    for key, content in _contents(folder, shard, MEASURES_MEMBER):
        yield key, decode_measures(key, content)


def read_infos(folder: Path, shard: Shard) -> Iterator[tuple[str, SampleInfo]]:
    """Yield (id, record) for each object in a shard.

    Raises:
        InputError: The index does not match the tar file, or a record is invalid.
    """
    for key, content in _contents(folder, shard, INFO_MEMBER):
        yield key, decode_info(key, content)


def _contents(folder: Path, shard: Shard, member: str) -> Iterator[tuple[str, bytes]]:
    spans = {key: members[member] for key, members in read_index(folder, shard).items() if member in members}
    yield from zip(spans, read_members(folder / shard.name, spans.values()), strict=True)
