"""A long-lived Blender process that renders one asset after another: ``python -m data_tools.blender.worker``.

It speaks lines of JSON. First line in: where things are and the settings; first line out: the renderer's name.
After that each line in is an asset, each line out its outcome, with the sizes of the sample's members, which follow as
plain bytes. When standard input closes (also because the driver was killed) the process ends at once, in the middle of
an object too. Everything that Blender prints goes to standard error.
"""

import dataclasses
import errno
import json
import os
import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt

from data_tools.assets.asset_list import Asset, AssetError, hash_file
from data_tools.assets.download import download
from data_tools.assets.file_types import check_mesh_file
from data_tools.quality.measures import MEASURES_MEMBER, encode_measures, measure_views
from data_tools.rendering.cameras import derive_seed, draw_cameras
from data_tools.rendering.settings import RenderSettings
from lrm_pl.data.geometry_views import depth_member, encode_depth, encode_normals, normal_member
from lrm_pl.data.schema import SURFACE_MEMBER, Sample, SampleInfo, encode_image, encode_sample
from lrm_pl.data.surface import SURFACE_POINTS, encode_surface
from lrm_pl.errors import InputError
from lrm_pl.meshing.triangles import sample_surface
from lrm_pl.storage import MissingError, StoreError

#: With less room than this in the scratch folder, bytes, an object that fails has failed for want of it.
_ROOM = 1 << 20


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told before its first asset.

    Attributes:
        assets: Absolute path of the assets folder.
        scratch: Absolute path of a folder for this worker alone; what holds it goes with the worker.
        threads: CPU threads that it may use.
        settings: Settings of the run.
    """

    assets: str
    scratch: str
    threads: int
    settings: RenderSettings


def main() -> None:
    """Serve until standard input closes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(
        sys.stderr.fileno(), sys.stdout.fileno()
    )  # Blender's C++ prints to descriptor 1, whatever sys.stdout is
    record = json.loads(sys.stdin.readline())
    setup = WorkerSetup(**record | {"settings": RenderSettings(**record["settings"])})
    lines = _read_lines_aside(sys.stdin, setup.scratch)
    from data_tools.blender.scene import choose_device, renderer_name  # loads Blender

    renderer = renderer_name(choose_device())
    _answer(answers, {"renderer": renderer}, {})
    while True:
        asset = Asset(**json.loads(lines.get()))
        print(f"--- {asset.id} ({asset.file})", file=sys.stderr, flush=True)
        outcome, reason, cycles_s, members = _try_render(asset, setup, renderer)
        _answer(answers, {"outcome": outcome, "reason": reason, "cycles_s": cycles_s}, members)


def render_object(asset: Asset, setup: WorkerSetup, renderer: str) -> tuple[Sample, float]:
    """Render all views of one asset in a scene of its own.

    Returns:
        The sample, and the seconds that Cycles itself took.

    Raises:
        AssetError: The asset cannot be imported, is empty, or no view shows anything.
        InputError: It is not the file that it should be, or cannot be downloaded.
    """
    from data_tools.blender import load_asset, passes
    from data_tools.blender import scene as blender_scene

    settings = setup.settings
    seed = derive_seed(settings.seed, asset.id)
    cameras = draw_cameras(settings.cameras, settings.views, np.random.default_rng(seed))
    path, sha256 = _mesh_file(asset, setup)
    check_mesh_file(path)
    half_extent, mesh = load_asset.load_asset(
        path,
        settings.normalize,
        Path(setup.scratch if asset.is_remote else setup.assets),
        asset.up,
    )
    extras = dict[str, bytes]()
    if settings.surface:
        rng = np.random.default_rng(derive_seed(settings.seed, asset.id, SURFACE_MEMBER))
        extras[SURFACE_MEMBER] = encode_surface(
            *sample_surface(load_asset.world_meshes(), SURFACE_POINTS, rng)
        )
    device = blender_scene.choose_device()
    blender_scene.set_up_scene(device, settings.resolution, settings.samples, setup.threads)
    blender_scene.add_camera()
    if settings.depth or settings.normals:
        passes.enable_passes(normals=settings.normals)
    images, scratch = list[npt.NDArray[np.uint8]](), Path(setup.scratch)
    with blender_scene.cycles_clock() as cycles_s:
        for view in range(settings.views):
            image = blender_scene.render_view(
                cameras.c2w[view],
                float(cameras.fxfycxcy[view, 0]),
                half_extent,
                derive_seed(settings.seed, asset.id, view),
                scratch,
            )
            images.append(image)
            if settings.depth or settings.normals:
                depth, normals = passes.read_geometry(image[..., 3], scratch)
                extras |= {depth_member(view): encode_depth(depth)} if settings.depth else {}
                extras |= {normal_member(view): encode_normals(normals)} if normals is not None else {}
    if not any(image[..., 3].any() for image in images):
        raise AssetError(f"renders to nothing: all {settings.views} views are transparent")
    info = SampleInfo(
        id=asset.id,
        **asset.record(),
        seed=seed,
        renderer=renderer,
        views=settings.views,
        sha256=sha256,
    )
    sample = Sample(
        info,
        cameras.c2w,
        cameras.fxfycxcy,
        tuple(encode_image(image) for image in images),
        extras | {MEASURES_MEMBER: encode_measures(measure_views(mesh, images))},
    )
    return sample, sum(cycles_s)


def _mesh_file(asset: Asset, setup: WorkerSetup) -> tuple[Path, str]:
    """Return where the mesh lies, and its sha256; a remote one is brought here first.

    Raises:
        InputError: It is another file, or cannot be downloaded.
    """
    if asset.is_remote:
        path = Path(setup.scratch) / f"{asset.id}{Path(asset.file).suffix.lower()}"
        return path, download(asset.file, path, sha256=asset.sha256 or None)
    path = Path(setup.assets) / asset.file
    if not path.is_file():
        raise InputError(expected=f"the mesh at {path}", found="no file", remedy="put it there")
    found = hash_file(path)
    if asset.sha256 and found != asset.sha256:
        raise InputError(
            expected=f"sha256 {asset.sha256} as listed",
            found=found,
            remedy="fetch the file again, or mend its row",
        )
    return path, found


def _try_render(
    asset: Asset, setup: WorkerSetup, renderer: str
) -> tuple[str, str, float, Mapping[str, bytes]]:
    try:
        sample, cycles_s = render_object(asset, setup, renderer)
        return "done", "", cycles_s, encode_sample(sample)
    except MissingError as error:
        return "failed", str(error), 0.0, {}
    except StoreError as error:
        return "unreachable", str(error), 0.0, {}
    except (AssetError, InputError) as error:
        return "failed", str(error), 0.0, {}
    except Exception as error:  # whatever one asset does to Blender, the next one is still rendered
        traceback.print_exc()
        full = os.strerror(errno.ENOSPC)
        # Blender does not always say so: then what it wrote cannot be read, and still takes the last room
        short = shutil.disk_usage(setup.scratch).free < _ROOM
        if short or getattr(error, "errno", None) == errno.ENOSPC or full in str(error):
            return "no space", f"{setup.scratch}: {error}", 0.0, {}
        return "failed", f"{type(error).__name__}: {str(error).strip()}", 0.0, {}
    finally:
        for path in Path(setup.scratch).iterdir():  # the next object finds an empty folder
            path.unlink()


def _read_lines_aside(stream: TextIO, scratch: str) -> "queue.SimpleQueue[str]":
    """Read lines in a thread, which ends the process as soon as the driver is gone."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        shutil.rmtree(Path(scratch).parent, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _answer(stream: BinaryIO, record: dict[str, Any], members: Mapping[str, bytes]) -> None:
    record = record | {"members": {name: len(content) for name, content in members.items()}}
    stream.write(json.dumps(record).encode() + b"\n")
    for content in members.values():
        stream.write(content)
    stream.flush()


if __name__ == "__main__":
    main()
