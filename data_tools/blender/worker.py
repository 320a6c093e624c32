"""The program ``python -m data_tools.blender.worker``, which renders assets in a Blender process.

Requests are lines of JSON on standard input. The first request is a ``WorkerSetup``, and the response contains the name
of the renderer. Each subsequent request is an asset. A response is written to standard output with
``multiprocessing.connection``. The first message is JSON with the status and the names of the members of the sample,
and each subsequent message is the content of a member. The process exits immediately when standard input is closed,
even during a render. Messages from Blender are written to standard error.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from data_tools.assets.asset_list import Asset, AssetError
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
from lrm_pl.paths import hash_file
from lrm_pl.storage import MissingError, StoreError

#: Free space of the scratch folder in bytes. If less space is available, a failure is attributed to a full disk.
_MIN_FREE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """First request to a worker.

    Attributes:
        assets: Absolute path of the assets folder.
        scratch: Absolute path of the temporary folder of the worker. The parent folder is removed at exit.
        threads: Number of CPU threads.
        settings: Settings of the run.
    """

    assets: str
    scratch: str
    threads: int
    settings: RenderSettings


def main() -> None:
    """Process requests until standard input is closed."""
    responses = Connection(os.dup(sys.stdout.fileno()), readable=False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the C++ code of Blender prints to descriptor 1
    record = json.loads(sys.stdin.readline())
    setup = WorkerSetup(**record | {"settings": RenderSettings(**record["settings"])})
    lines = _start_reader(sys.stdin, setup.scratch)
    from data_tools.blender.scene import renderer_name  # imports Blender, which is slow

    renderer = renderer_name()
    _respond(responses, {"renderer": renderer}, {})
    while True:
        asset = Asset(**json.loads(lines.get()))
        print(f"--- {asset.id} ({asset.file})", file=sys.stderr, flush=True)
        _respond(responses, *_try_render(asset, setup, renderer))


def render_object(asset: Asset, setup: WorkerSetup, renderer: str) -> tuple[Sample, float]:
    """Render all views of one asset in a new scene.

    Args:
        asset: Asset to render.
        setup: Setup of the worker.
        renderer: Name of the renderer, which is stored in the sample.

    Returns:
        The sample, and the render time of Cycles in seconds.

    Raises:
        AssetError: The asset cannot be imported or is empty, or all views are transparent.
        InputError: The mesh file is missing, cannot be downloaded, or does not match the hash in the asset list.
    """
    from data_tools.blender import passes, scene
    from data_tools.blender.load_asset import load_asset, world_meshes

    settings = setup.settings
    seed = derive_seed(settings.seed, asset.id)
    cameras = draw_cameras(settings.cameras, settings.views, np.random.default_rng(seed))
    path, sha256 = _mesh_file(asset, setup)
    check_mesh_file(path)
    half_extent, mesh = load_asset(
        path,
        settings.normalize,
        Path(setup.scratch if asset.is_remote else setup.assets),
        asset.up,
    )
    extras = dict[str, bytes]()
    if settings.surface:
        rng = np.random.default_rng(derive_seed(settings.seed, asset.id, SURFACE_MEMBER))
        extras[SURFACE_MEMBER] = encode_surface(*sample_surface(world_meshes(), SURFACE_POINTS, rng))
    scene.set_up_scene(settings.resolution, settings.samples, setup.threads)
    has_passes = settings.depth or settings.normals
    if has_passes:
        passes.enable_passes(normals=settings.normals)
    images, scratch, cycles_s = list[npt.NDArray[np.uint8]](), Path(setup.scratch), 0.0
    for view in range(settings.views):
        focal, view_seed = float(cameras.fxfycxcy[view, 0]), derive_seed(settings.seed, asset.id, view)
        image, seconds = scene.render_view(cameras.c2w[view], focal, half_extent, view_seed, scratch)
        images.append(image)
        cycles_s += seconds
        if has_passes:
            depth, normals = passes.read_geometry(image[..., 3], scratch)
            extras |= {depth_member(view): encode_depth(depth)} if settings.depth else {}
            extras |= {normal_member(view): encode_normals(normals)} if normals is not None else {}
    if not any(image[..., 3].any() for image in images):
        raise AssetError(
            expected="a visible object", found=f"only transparent pixels in {settings.views} views"
        )
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
    return sample, cycles_s


def _mesh_file(asset: Asset, setup: WorkerSetup) -> tuple[Path, str]:
    """Return the path and sha256 of the mesh. If the mesh is remote, it is downloaded.

    Raises:
        InputError: The file is missing, cannot be downloaded, or does not have the expected hash.
    """
    if asset.is_remote:
        path = Path(setup.scratch) / f"{asset.id}{Path(asset.file).suffix.lower()}"
        return path, download(asset.file, path, asset.sha256)
    path = Path(setup.assets) / asset.file
    if not path.is_file():
        raise InputError(expected=f"a mesh at {path}", found="no file")
    found = hash_file(path)
    if asset.sha256 and found != asset.sha256:
        raise InputError(
            expected=f"sha256 {asset.sha256} as in the asset list",
            found=found,
            remedy="fetch the file again or correct the list",
        )
    return path, found


def _try_render(
    asset: Asset, setup: WorkerSetup, renderer: str
) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """Render an asset and return the response."""
    status = "failed"
    try:
        sample, cycles_s = render_object(asset, setup, renderer)
        return {"status": "done", "cycles_s": cycles_s}, encode_sample(sample)
    except InputError as error:
        reason = str(error)
        if isinstance(error, StoreError) and not isinstance(error, MissingError):
            status = "unreachable"
    except Exception as error:  # an error in one asset must not stop the worker
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error).strip()}"
        # Blender does not always report a full disk, so the error can be that a file is not readable
        short = shutil.disk_usage(setup.scratch).free < _MIN_FREE_BYTES
        if short or getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason:
            status, reason = "no space", f"{setup.scratch}: {error}"
    finally:
        for path in Path(setup.scratch).iterdir():  # the folder must be empty for the next object
            path.unlink()
    return {"status": status, "reason": reason}, {}


def _start_reader(stream: TextIO, scratch: str) -> "queue.SimpleQueue[str]":
    """Return a queue to which a thread adds the lines of a stream. The process exits when the stream is closed."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        shutil.rmtree(Path(scratch).parent, ignore_errors=True)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _respond(responses: Connection, record: dict[str, Any], members: Mapping[str, bytes]) -> None:
    responses.send_bytes(json.dumps(record | {"members": list(members)}).encode())
    for content in members.values():
        responses.send_bytes(content)


if __name__ == "__main__":
    main()
