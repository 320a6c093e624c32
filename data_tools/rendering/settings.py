"""Settings that determine the pixels and the layout of a folder of shards.

They are stored in ``render.json`` before the first object is rendered. Later runs in the same folder must use the same
settings.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from data_tools.quality.measures import DEFAULT_RULES, Rule, parse_rule
from data_tools.rendering.cameras import PRESETS, CameraPreset
from data_tools.rendering.shard_plan import estimate_object_bytes
from lrm_pl.conventions import Normalization
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError

SETTINGS_NAME = "render.json"

#: Version of the rendering pipeline. It must be increased when a change affects the pixels or the layout of the shards.
#: A folder with a different version cannot be resumed.
PIPELINE_VERSION = 7


@dataclasses.dataclass(frozen=True)
class RenderSettings:
    """Settings that, together with the assets, determine the bytes of the shards.

    Attributes:
        preset: Name of the camera preset.
        normalize: Normalization of the objects, "sphere" or "cube".
        views: Number of views per object.
        resolution: Width and height of the views in pixels.
        samples: Number of Cycles samples per pixel.
        seed: Seed of the cameras and of Cycles.
        held_out: Number of objects in the validation split.
        shard_size: Number of objects per shard.
        depth: Whether to store a depth map for each view.
        normals: Whether to store a normal map for each view.
        surface: Whether to store points on the surface of each object.
        rules: Rules that objects must satisfy (see ``parse_rule``). Objects that violate a rule are rejected.
        pipeline_version: Version of the rendering pipeline.
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
        """The camera preset."""
        return PRESETS[self.preset]

    @property
    def parsed_rules(self) -> list[Rule]:
        """The rules that objects must satisfy."""
        return [parse_rule(rule) for rule in self.rules]

    @property
    def object_bytes(self) -> int:
        """Upper estimate of the size of a sample in bytes."""
        return estimate_object_bytes(
            self.views, self.resolution, depth=self.depth, normals=self.normals, surface=self.surface
        )

    def record(self) -> dict[str, Any]:
        """Return the settings and the ranges of the camera preset as JSON values."""
        ranges = dataclasses.asdict(self.cameras)
        del ranges["normalize"], ranges["orbit"]
        return json.loads(json.dumps(dataclasses.asdict(self) | ranges))


def write_settings(folder: Path, settings: RenderSettings, renderer: str) -> None:
    """Write ``render.json``."""
    record = settings.record() | {"renderer": renderer}
    write_atomically(folder / SETTINGS_NAME, (json.dumps(record, indent=1) + "\n").encode())


def read_settings(folder: Path) -> dict[str, Any]:
    """Read ``render.json``, which contains the settings and the name of the renderer."""
    return dict(json.loads((folder / SETTINGS_NAME).read_bytes()))


def check_settings(folder: Path, settings: RenderSettings, renderer: str | None = None) -> bool:
    """Compare ``render.json`` with the settings of a run.

    Args:
        folder: Folder of shards.
        settings: Settings of the run.
        renderer: Name of the renderer. If None, the renderer is not compared.

    Returns:
        Whether the folder has a ``render.json``.

    Raises:
        InputError: A setting differs, ``render.json`` is invalid, or the folder has shards but no ``render.json``.
    """
    path = folder / SETTINGS_NAME
    if not path.is_file():
        strays = sorted(p.name for pattern in ("*.tar", "manifest.json") for p in folder.glob(pattern))
        if strays:
            raise InputError(
                subject=folder,
                expected=f"an empty folder or a folder with {SETTINGS_NAME}",
                found=f"{strays[0]} with unknown settings",
                remedy="choose another output folder. `python -m data_tools merge` joins finished folders",
            )
        return False
    try:
        found = read_settings(folder)
        found_renderer = found.pop("renderer")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            subject=path,
            expected="render settings",
            found=f"{error!r}",
            remedy="restore the folder, or choose another output folder",
        ) from error
    expected = settings.record()
    if renderer is not None:
        expected["renderer"], found["renderer"] = renderer, found_renderer
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise InputError(
                subject=f"{path}: {name}",
                expected=f"{expected.get(name)!r}",
                found=f"{found.get(name)!r} in the folder",
                remedy=_remedy(name, folder),
            )
    return True


def recorded_count(folder: Path, name: Literal["held_out", "shard_size"]) -> int | None:
    """Read the setting ``held_out`` or ``shard_size`` from ``render.json``, or return None if it cannot be read."""
    try:
        found = read_settings(folder)[name]
    except (ValueError, KeyError, TypeError, OSError):  # reported by ``check_settings``
        return None
    return found if type(found) is int else None


#: Mapping from settings that ``repack`` can change without rendering to the options of ``repack``.
_REPACKED = {
    "rules": "--where RULE ...",
    "held_out": "--held-out N",
    "shard_size": "--shard-size N",
    "resolution": "--res N (smaller)",
}


def _remedy(name: str, folder: Path) -> str:
    if name in _REPACKED:
        repack = f"python -m data_tools repack --shards {folder} --out ... {_REPACKED[name]}"
        return f"finish the folder, then run `{repack}`, or choose another output folder"
    return "use the settings of the folder, or choose another output folder and join the finished folders with `merge`"
