"""A long-lived Blender process that renders one asset after another: ``python -m data_tools.blender_worker``.

It speaks JSON lines. First line in: where things are and the settings; first line out: the renderer's name.
After that each line in is an asset, each line out its outcome, and the finished object lies in the parts
folder. When standard input closes (also because the driver was killed) the process ends at once, in the
middle of an object too. Everything that Blender prints goes to standard error.
"""

import dataclasses
import errno
import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_tools.assets import Asset
from data_tools.settings import RenderSettings
from data_tools.shard_folder import write_part
from data_tools.views import derive_seed, draw_cameras
from lrm_pl.data.schema import Sample, SampleInfo, encode_image


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told before its first asset.

    Attributes:
        assets: Absolute path of the assets folder.
        out: Absolute path of the folder of shards.
        scratch: Absolute path of a folder for this worker alone.
        threads: CPU threads that it may use.
        settings: Settings of the run.
    """

    assets: str
    out: str
    scratch: str
    threads: int
    settings: RenderSettings


def main() -> None:
    """Serve until standard input closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # Blender's C++ prints to descriptor 1, whatever sys.stdout is
    lines = _read_lines_aside(sys.stdin)
    record = json.loads(lines.get())
    setup = WorkerSetup(**record | {"settings": RenderSettings(**record["settings"])})
    from data_tools.blender_scene import choose_device, renderer_name  # loads Blender

    renderer = renderer_name(choose_device())
    _answer(answers, {"renderer": renderer})
    while True:
        asset = Asset(**json.loads(lines.get()))
        print(f"--- {asset.id} ({asset.file})", file=sys.stderr, flush=True)
        _answer(answers, {"id": asset.id} | _try_render(asset, setup, renderer))


def render_object(asset: Asset, setup: WorkerSetup, renderer: str) -> Sample:
    """Render all views of one asset in a scene of its own.

    Raises:
        AssetError: The asset cannot be imported, is empty, or no view shows anything.
    """
    from data_tools import blender_import, blender_scene

    settings = setup.settings
    seed = derive_seed(settings.seed, asset.id)
    cameras = draw_cameras(settings.cameras, settings.views, np.random.default_rng(seed))
    half_extent = blender_import.load_asset(Path(setup.assets) / asset.file, settings.normalise)
    device = blender_scene.choose_device()
    blender_scene.set_up_scene(device, settings.resolution, settings.samples, setup.threads)
    blender_scene.add_camera()
    images = [
        blender_scene.render_view(
            cameras.c2w[view],
            float(cameras.fxfycxcy[view, 0]),
            half_extent,
            derive_seed(settings.seed, asset.id, view),
            Path(setup.scratch),
        )
        for view in range(settings.views)
    ]
    if not any(image[..., 3].any() for image in images):
        raise blender_import.AssetError(f"renders to nothing: all {settings.views} views are transparent")
    info = SampleInfo(
        id=asset.id,
        name=asset.name,
        licence=asset.licence,
        creator=asset.creator,
        source=asset.source,
        seed=seed,
        renderer=renderer,
        views=settings.views,
    )
    return Sample(info, cameras.c2w, cameras.fxfycxcy, tuple(encode_image(image) for image in images))


def _try_render(asset: Asset, setup: WorkerSetup, renderer: str) -> dict[str, str]:
    from data_tools.blender_import import AssetError

    try:
        write_part(Path(setup.out), render_object(asset, setup, renderer))
    except AssetError as error:
        return {"outcome": "failed", "reason": str(error)}
    except Exception as error:  # whatever one asset does to Blender, the next one is still rendered
        traceback.print_exc()
        full = os.strerror(errno.ENOSPC)
        if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):
            return {"outcome": "no space", "reason": str(error)}
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error).strip()}"}
    return {"outcome": "done", "reason": ""}


def _read_lines_aside(stream: TextIO) -> "queue.SimpleQueue[str]":
    """Read lines in a thread, which ends the process as soon as the driver is gone."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _answer(stream: TextIO, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
