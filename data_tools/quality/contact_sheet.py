"""The contact sheet of a folder of shards, ``contact_sheet.png``."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lrm_pl.data.manifest import Shard, new_file, read_index, read_members
from lrm_pl.data.schema import IMAGE_FORMATS, view_member

SHEET_NAME = "contact_sheet.png"

MAX_OBJECTS = 96
VIEWS_SHOWN = 4
COLUMNS = 4
THUMBNAIL = 80
LABEL = 16
GAP = 8

INK = {"train": (20, 20, 20), "val": (180, 60, 0)}


def write_contact_sheet(folder: Path, shards: Sequence[Shard], views: int) -> Path:
    """Write an image that shows views and ids of at most ``MAX_OBJECTS`` objects, evenly spaced over all shards.

    Args:
        folder: Folder of shards.
        shards: All shards. Rejected shards are skipped.
        views: Number of views per object.

    Returns:
        Path of the image.
    """
    found = [
        (shard, key, members)
        for shard in shards
        if not shard.rejected
        for key, members in read_index(folder, shard).items()
    ]
    step = max(1, -(-len(found) // MAX_OBJECTS))
    shown = found[::step]
    count = min(views, VIEWS_SHOWN)
    width, height = count * THUMBNAIL + GAP, THUMBNAIL + LABEL + GAP
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + LABEL + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    title = f"{len(shown)} of {len(found)} objects, {count} of {views} views per object; held-out objects in orange"
    pen.text((GAP, GAP // 2), title, fill="black", font=font)
    for cell, (shard, key, members) in enumerate(shown):
        left = GAP + cell % COLUMNS * width
        top = LABEL + GAP + cell // COLUMNS * height
        for column in range(count):
            thumbnail = _thumbnail(folder / shard.name, members, column * views // count)
            sheet.paste(thumbnail, (left + column * THUMBNAIL, top), thumbnail)
        pen.text((left, top + THUMBNAIL), key[:48], fill=INK[shard.split], font=font)
    path = folder / SHEET_NAME
    with new_file(path) as file:
        sheet.save(file, format="PNG")
    return path


def _thumbnail(tar: Path, members: Mapping[str, tuple[int, int]], view: int) -> Image.Image:
    names = [view_member(view, image_format) for image_format in IMAGE_FORMATS]
    (content,) = read_members(tar, [members[name] for name in names if name in members])
    with Image.open(io.BytesIO(content), formats=[name.upper() for name in IMAGE_FORMATS]) as image:
        return image.convert("RGBA").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
