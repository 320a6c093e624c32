"""Draw ``contact_sheet.png``: a few views and the name of each object of a finished folder of shards."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lrm_pl.data.manifest import Shard, read_index
from lrm_pl.data.schema import view_member

SHEET_NAME = "contact_sheet.png"

MAX_OBJECTS = 96
VIEWS_SHOWN = 4
COLUMNS = 4
THUMBNAIL = 80
LABEL = 16
GAP = 8

INK = {"train": (20, 20, 20), "val": (180, 60, 0)}


def write_contact_sheet(folder: Path, shards: Sequence[Shard], views: int) -> Path:
    """Draw the sheet: one cell an object, held-out ones in another ink; at most 96, spread over the shards.

    Args:
        folder: Folder of the shards.
        shards: All shards.
        views: Views an object.

    Returns:
        Where the picture is.
    """
    found = [(shard, key) for shard in shards for key in read_index(folder, shard)]
    step = max(1, -(-len(found) // MAX_OBJECTS))
    shown = found[::step]
    count = min(views, VIEWS_SHOWN)
    width, height = count * THUMBNAIL + GAP, THUMBNAIL + LABEL + GAP
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + LABEL + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    title = f"{len(shown)} of {len(found)} objects, {count} of {views} views each; held-out objects in orange"
    pen.text((GAP, GAP // 2), title, fill="black", font=font)
    for cell, (shard, key) in enumerate(shown):
        left = GAP + cell % COLUMNS * width
        top = LABEL + GAP + cell // COLUMNS * height
        for place in range(count):
            thumbnail = _thumbnail(folder, shard, key, place * views // count)
            sheet.paste(thumbnail, (left + place * THUMBNAIL, top), thumbnail)
        pen.text((left, top + THUMBNAIL), key[:48], fill=INK[shard.split], font=font)
    path = folder / SHEET_NAME
    partial = path.with_name(SHEET_NAME + ".partial")
    sheet.save(partial, format="PNG")
    partial.replace(path)
    return path


def _thumbnail(folder: Path, shard: Shard, key: str, view: int) -> Image.Image:
    offset, size = read_index(folder, shard)[key][view_member(view)]
    with open(folder / shard.name, "rb") as tar:
        tar.seek(offset)
        with Image.open(io.BytesIO(tar.read(size)), formats=("PNG",)) as image:
            return image.convert("RGBA").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
