"""How fetching ends: the list of assets, whom to credit, what was left out and why, what to type next.

OUT/assets.parquet    what can be rendered (data_tools/assets/asset_list.py)
OUT/ATTRIBUTION.txt   creator, license and source of each, which licenses such as CC BY ask for
OUT/left_out.jsonl    {"id", "reason"} of what cannot
"""

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_tools.assets.asset_list import LIST_NAME, MAX_ID_LENGTH, Asset, write_list
from lrm_pl.data.manifest import write_atomically
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import InputError, counted

LEFT_OUT_NAME = "left_out.jsonl"
ATTRIBUTION_NAME = "ATTRIBUTION.txt"


def make_id(text: str) -> str:
    """Return a name that others chose as an id and file name; names that differ give ids that differ.

    One that cannot be an id has its strange characters replaced by "_", and its hash at its end.
    """
    if KEY_PATTERN.fullmatch(text):
        return text
    mark = "_" + hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)[: MAX_ID_LENGTH - len(mark)] + mark


def write_outputs(
    out: Path, assets: Sequence[Asset], left_out: Mapping[str, str], changes: str, hint: str = ""
) -> None:
    """Write the three files and print the closing lines.

    Args:
        out: Folder of the meshes.
        assets: What can be rendered.
        left_out: Id -> reason; what stands before its first ":" is its kind.
        changes: What was done to the meshes, for whom it may concern.
        hint: What to do about what was left out.

    Raises:
        InputError: Nothing is left.
    """
    lines = [json.dumps({"id": key, "reason": left_out[key]}) + "\n" for key in sorted(left_out)]
    write_atomically(out / LEFT_OUT_NAME, "".join(lines).encode())
    if left_out:
        print(f"Left out {len(left_out)} of {len(assets) + len(left_out)}, listed in {out / LEFT_OUT_NAME}:")
        for kind, count in Counter(reason.partition(":")[0] for reason in left_out.values()).most_common():
            print(f"  {count:6d}  {kind}")
        if hint:
            print(hint)
    if not assets:
        raise InputError(
            expected="at least one usable asset",
            found=f"none: {len(left_out)} left out",
            remedy=f"read {out / LEFT_OUT_NAME}, then run the same command again",
        )
    write_atomically(out / ATTRIBUTION_NAME, _attribution(assets, changes).encode("utf-8", "replace"))
    write_list(out, assets)
    splits = Counter(asset.split for asset in assets)
    held_out = f", {splits['val']} of them held out (val)" if splits["val"] else ""
    print(f"{counted(len(assets), 'asset')}{held_out} in {out / LIST_NAME}")
    print(next_command(out))


def next_command(assets: Path) -> str:
    """Return the line that says how to render a folder of assets."""
    out = f"data/{assets.resolve().name}"
    return f"next  make render-shards ASSETS={shlex.quote(str(assets))} OUT={shlex.quote(out)}"


def _attribution(assets: Sequence[Asset], changes: str) -> str:
    lines = [changes, "", "id | name | creator | license | source"]
    for asset in sorted(assets, key=lambda asset: asset.id):
        fields = (asset.id, asset.name, asset.creator, asset.license, asset.source)
        lines.append(" | ".join(" ".join(field.split()) for field in fields))
    return "\n".join(lines) + "\n"
