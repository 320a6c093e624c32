"""What decides the pixels and the layout of a folder of shards, kept in that folder: ``render.json``.

It is written before the first object. A later run in the same folder must agree with it, or it would mix two kinds of
data. What is rendered may grow: ``continuation``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_tools.quality.measures import DEFAULT_RULES
from data_tools.rendering.cameras import PRESETS, CameraPreset
from lrm_pl.conventions import Normalization
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError

SETTINGS_NAME = "render.json"

#: Raise it when a change to this package changes pixels or layout: old folders then refuse to be continued.
PIPELINE_VERSION = 7


class SettingsError(InputError):
    """A folder holds shards made otherwise, or settings that make no sense."""


@dataclasses.dataclass(frozen=True)
class RenderSettings:
    """Everything but the assets that decides the bytes of the shards.

    Attributes:
        preset: Name of the camera preset.
        normalize: How objects are scaled.
        views: Views an object.
        resolution: Side of the square images, pixels.
        samples: Cycles samples a pixel.
        seed: Seed of all cameras and of Cycles.
        held_out: Number of objects in the validation split.
        shard_size: Objects a shard.
        depth: Whether views have their depth beside them.
        normals: Whether they have their normals.
        surface: Whether objects have points of their surface beside their views.
        rules: What an object must obey, else it is rejected (``criteria.parse_rule``).
        pipeline_version: Version of this package's rendering.
    """

    preset: str
    normalize: Normalization
    views: int
    resolution: int
    samples: int
    seed: int
    held_out: int
    shard_size: int
    depth: bool = False
    normals: bool = False
    surface: bool = False
    rules: tuple[str, ...] = DEFAULT_RULES
    pipeline_version: int = PIPELINE_VERSION

    @property
    def cameras(self) -> CameraPreset:
        """The ranges that the preset stands for."""
        return PRESETS[self.preset]

    def record(self) -> dict[str, Any]:
        """Return the settings, with the preset's ranges spelled out, as JSON values."""
        ranges = dataclasses.asdict(self.cameras)
        del ranges["normalize"], ranges["orbit"]
        return json.loads(json.dumps(dataclasses.asdict(self) | ranges))


def write_settings(folder: Path, settings: RenderSettings, renderer: str) -> None:
    """Write ``render.json``."""
    record = settings.record() | {"renderer": renderer}
    write_atomically(folder / SETTINGS_NAME, (json.dumps(record, indent=1) + "\n").encode())


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in ``render.json``, the renderer's name among them."""
    return dict(json.loads((folder / SETTINGS_NAME).read_bytes()))


def check_settings(folder: Path, settings: RenderSettings, renderer: str | None = None) -> bool:
    """Compare ``render.json`` with what is asked for now.

    Args:
        folder: Folder of the shards.
        settings: Settings of this run.
        renderer: Renderer of this run; None while it is not known.

    Returns:
        Whether the folder has a ``render.json``.

    Raises:
        SettingsError: At the first difference, or where shards lie there without the file.
    """
    path = folder / SETTINGS_NAME
    if not path.is_file():
        strays = sorted(p.name for pattern in ("*.tar", "manifest.json") for p in folder.glob(pattern))
        if strays:
            raise SettingsError(
                subject=folder,
                expected=f"an empty folder or one with {SETTINGS_NAME}",
                found=f"{strays[0]} of unknown settings",
                remedy="choose another OUT= (`python -m data_tools merge` joins finished folders)",
            )
        return False
    try:
        # As folders are that were made before there were these.
        found = {"depth": False, "normals": False, "surface": False} | read_settings(folder)
        found_renderer = found.pop("renderer")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SettingsError(
            subject=path,
            expected="the settings of a rendering",
            found=f"{error!r}",
            remedy="copy the folder again, or choose another OUT=",
        ) from error
    expected = settings.record()
    if renderer is not None:
        expected["renderer"], found["renderer"] = renderer, found_renderer
    for name in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(name) != found.get(name):
            raise SettingsError(
                subject=f"{path}: {name}",
                expected=f"{expected.get(name)!r} as asked for now",
                found=f"{found.get(name)!r}",
                remedy=_remedy(name, folder),
            )
    return True


def recorded_held_out(folder: Path) -> int | None:
    """Return how many objects a folder that was begun holds out; None where it does not say."""
    try:
        found = read_settings(folder)["held_out"]
    except (ValueError, KeyError, TypeError, OSError):  # ``check_settings`` looks at what is wrong
        return None
    return found if type(found) is int else None


#: Settings that finished shards can be given without rendering -> option of ``repack``.
_REPACKED = {
    "rules": "--where RULE ...",
    "held_out": "--held-out N",
    "shard_size": "--shard-size N",
    "resolution": "--res N (smaller)",
}


def _remedy(name: str, folder: Path) -> str:
    if name in _REPACKED:
        return (
            "finish the folder as it is, then change it without rendering: `python -m data_tools repack --shards "
            f"{folder} --out ... {_REPACKED[name]}`; or choose another OUT="
        )
    return (
        "go on with that, or choose another OUT= for what is not rendered yet (`python -m data_tools merge` joins "
        "finished folders of the same views, resolution and scale)"
    )
