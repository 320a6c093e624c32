"""Output files and printed summary of the ``fetch`` sources.

OUT/assets.parquet    the asset list (see ``asset_list``)
OUT/ATTRIBUTION.txt   creator, license and source of each asset, which licenses such as CC BY require
OUT/left_out.jsonl    {"id", "reason"} for each object that is left out
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.assets.asset_list import LIST_NAME, Asset, hashed_id, write_list
from lrm_pl.data.manifest import write_atomically
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import InputError, counted

LEFT_OUT_NAME = "left_out.jsonl"
ATTRIBUTION_NAME = "ATTRIBUTION.txt"


def make_id(text: str) -> str:
    """Return an id for a name. The id is a valid file name, and different names have different ids."""
    return text if KEY_PATTERN.fullmatch(text) else hashed_id(text)


def write_outputs(
    out: Path, assets: Sequence[Asset], left_out: Mapping[str, str], changes: str, hint: str = ""
) -> None:
    """Write the output files and print a summary.

    Args:
        out: Folder of the meshes, to which the files are written.
        assets: Usable assets.
        left_out: Mapping from the ids of objects that are left out to the reasons. The printed summary counts the
            reasons by their text before the first ":".
        changes: Description of the collection and of modifications to the meshes, for ``ATTRIBUTION.txt``.
        hint: Line to print if objects were left out. If "", no line is printed.

    Raises:
        InputError: There are no usable assets.
    """
    lines = [json.dumps({"id": key, "reason": left_out[key]}) + "\n" for key in sorted(left_out)]
    write_atomically(out / LEFT_OUT_NAME, "".join(lines).encode())
    if left_out:
        total = len(assets) + len(left_out)
        print(f"Left out {len(left_out)} of {counted(total, 'object')} (reasons in {out / LEFT_OUT_NAME}):")
        categories = Counter(reason.partition(":")[0] for reason in left_out.values())
        for category, count in categories.most_common():
            print(f"  {count:6d}  {category}")
        if hint:
            print(hint)
    if not assets:
        raise InputError(
            expected="at least one usable asset",
            found=f"none ({len(left_out)} left out)",
            remedy=f"read the reasons in {out / LEFT_OUT_NAME}, then run the same command again",
        )
    write_atomically(out / ATTRIBUTION_NAME, _attribution(assets, changes).encode("utf-8", "replace"))
    write_list(out, assets)
    splits = Counter(asset.split for asset in assets)
    held_out = f" ({splits['val']} in the split val)" if splits["val"] else ""
    print(f"Listed {counted(len(assets), 'asset')}{held_out} in {out / LIST_NAME}")
    print(next_command(out))


def next_command(assets: Path) -> str:
    """Return a line with the command that renders a folder of assets."""
    out = f"data/{assets.resolve().name}"
    return f"next  make render-shards ASSETS={shlex.quote(str(assets))} OUT={shlex.quote(out)}"


def _attribution(assets: Sequence[Asset], changes: str) -> str:
    lines = [changes, "", "id | name | creator | license | source"]
    for asset in sorted(assets, key=lambda asset: asset.id):
        fields = (asset.id, asset.name, asset.creator, asset.license, asset.source)
        lines.append(" | ".join(" ".join(field.split()) for field in fields))
    return "\n".join(lines) + "\n"
