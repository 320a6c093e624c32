"""Gradio page for ``lrm demo``."""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from lrm_pl.errors import InputError
from lrm_pl.images import open_image
from lrm_pl.inference.options import MeshOptions, require_between
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import make_mesh, to_tensor, to_uint8
from lrm_pl.inference.video import encode_video
from lrm_pl.meshing.glb import encode_glb
from lrm_pl.progress import listening, stage

#: Folder of example images, which are renderings of the CC0 demo objects.
EXAMPLES = Path(__file__).with_name("examples")

#: Maximum size of an upload in megabytes, and maximum number of pixels in millions.
MEGABYTES, MEGAPIXELS = 16, 25

#: Maximum number of waiting visitors.
QUEUE = 16

#: Ranges of the grid resolution and of the density threshold. The threshold 0 means that it is estimated.
RESOLUTIONS, THRESHOLDS = (64, 384), (0, 60)

#: Number of frames of the orbit, and side length of a frame in pixels.
_FRAMES, _SIDE = 36, 256

#: Time in seconds until files of visitors are deleted, and interval between two cleanups.
_KEEP_S, _CLEANUP_S = 3600, 600


def launch(pipeline: LRMPipeline, host: str, port: int) -> Any:  # noqa: ANN401 - a gradio.Blocks
    """Serve the page in background threads. Uploads and results are deleted when the process ends.

    Args:
        pipeline: Trained model.
        host: Address to listen on.
        port: Port to listen on.

    Returns:
        The ``gradio.Blocks`` of the page.
    """
    folder = Path(tempfile.mkdtemp(prefix="lrm-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in (signal.SIGTERM, signal.SIGHUP):  # exit handlers must also run after these signals
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(name, lambda *_: sys.exit(0))
    # Gradio reads the environment when it is imported. The proxies are removed from the environment because gradio
    # sends a request to the page, which proxies cannot reach.
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
    for variable in [
        each for each in os.environ if each.lower() in ("http_proxy", "https_proxy", "all_proxy")
    ]:
        del os.environ[variable]
    page = make_page(pipeline, folder)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=f"{MEGABYTES}mb",
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
    )
    threading.Thread(target=_clean_up_periodically, args=(folder,), daemon=True).start()
    return page


def clean_up(folder: Path, keep_s: float) -> None:
    """Delete interrupted uploads and empty result folders, which gradio does not delete.

    Args:
        folder: Folder that contains uploads and results.
        keep_s: Minimum age in seconds of the files to delete.
    """
    for path in folder.glob("tmp*"):
        with contextlib.suppress(OSError):  # the folder is not empty, or the file has been deleted
            if time.time() - path.stat().st_mtime >= keep_s:
                path.rmdir() if path.is_dir() else path.unlink()


def _clean_up_periodically(folder: Path) -> None:
    while True:
        time.sleep(_CLEANUP_S)
        clean_up(folder, _KEEP_S)


def reject_urls(data: Any) -> None:  # noqa: ANN401 - JSON
    """Reject inputs that refer to a file by its URL, because gradio would download the file.

    Args:
        data: Inputs of a request, as decoded from JSON.

    Raises:
        gradio.Error: An input is a URL.
    """
    import gradio as gr

    if isinstance(data, list):
        for part in data:
            reject_urls(part)
    elif isinstance(data, dict):
        path = data.get("path")
        if isinstance(path, str) and "://" in path:
            raise gr.Error(f"Upload the image; URLs such as {path} are not supported.")
        reject_urls(list(data.values()))


def make_page(pipeline: LRMPipeline, folder: Path) -> Any:  # noqa: ANN401 - a gradio.Blocks
    """Create the Gradio page of ``lrm demo``.

    Args:
        pipeline: Trained model.
        folder: Folder to which results are written.

    Returns:
        The ``gradio.Blocks`` of the page.
    """
    import gradio as gr

    class Page(gr.Blocks):  # type: ignore[misc]
        async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any) -> Any:  # noqa: ANN401 - gradio's
            reject_urls(inputs)
            return await super().preprocess_data(block_fn, inputs, *more, **options)

    def reconstruct(
        photo: dict[str, Any] | None,
        resolution: float,
        threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - required by gradio
    ) -> tuple[Any, ...]:
        if photo is None or photo["path"] is None:
            raise gr.Error("Choose an image first.", title="No image", print_exception=False)
        stages = 0

        def show_stage(name: str) -> None:
            nonlocal stages
            stages += 1
            progress(min(0.95, stages / 12), desc=name)

        try:
            with listening(show_stage):
                # The inputs are JSON from the client, because gradio does not preprocess them.
                resolution, threshold = int(resolution), float(threshold)
                require_between("grid resolution", resolution, *RESOLUTIONS)
                require_between("density threshold", threshold, *THRESHOLDS)
                image = open_image(
                    Path(photo["path"]),
                    "This file",
                    max_bytes=MEGABYTES * 10**6,
                    max_pixels=MEGAPIXELS * 10**6,
                )
                framed = pipeline.preprocess(image)
                scene = pipeline(to_tensor(framed))
                options = MeshOptions(threshold=threshold or None, resolution=resolution, floaters=0.01)
                mesh, _ = make_mesh(scene, options)
                with stage("orbit"):
                    frames = [to_uint8(frame) for frame in scene.orbit(_FRAMES, _SIDE, 15.0)]
                result = Path(tempfile.mkdtemp(dir=folder))
                (result / "mesh.glb").write_bytes(encode_glb(mesh))
                (result / "orbit.mp4").write_bytes(encode_video(frames))
        except InputError as error:
            raise gr.Error(
                str(error), title="No reconstruction", duration=None, print_exception=False
            ) from error
        density = threshold or scene.threshold
        summary = f"{len(mesh.faces):,} triangles; surface at density {density:.3g}."
        white = Image.alpha_composite(Image.new("RGBA", framed.size, "white"), framed).convert("RGB")
        glb = str(result / "mesh.glb")
        return white, str(result / "orbit.mp4"), glb, glb, summary

    with Page(title="lrm", analytics_enabled=False, delete_cache=(_CLEANUP_S, _KEEP_S)) as page:
        gr.Markdown(
            f"# From a photo to a 3D model\n`{pipeline.source}` (LRM, arXiv 2311.04400). Use an image of one whole "
            "object. The background is removed unless the image has transparency."
        )
        with gr.Row():
            with gr.Column(scale=1):
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=280, elem_id="photo")
                resolution = gr.Slider(*RESOLUTIONS, 192, step=32, label="Grid resolution")
                threshold = gr.Slider(*THRESHOLDS, 0, step=0.5, label="Density threshold (0: automatic)")
                button = gr.Button("Reconstruct", variant="primary", elem_id="go")
                gr.Examples(
                    [[str(path)] for path in sorted(EXAMPLES.glob("*.png"))], [photo], label="Examples"
                )
            with gr.Column(scale=2):
                with gr.Row():
                    framed = gr.Image(
                        label="Network input", height=280, interactive=False, elem_id="network-input"
                    )
                    orbit = gr.Video(label="Orbit", height=280, autoplay=True, loop=True, elem_id="orbit")
                mesh = gr.Model3D(label="Mesh", height=380, clear_color=(1, 1, 1, 1), elem_id="mesh")
                summary = gr.Markdown(elem_id="summary")
                download = gr.DownloadButton("Download mesh.glb", elem_id="download")
        outputs = [framed, orbit, mesh, download, summary]
        # The first step clears previous outputs. The inputs are validated by `reconstruct` instead of gradio.
        button.click(lambda: (None, None, None, None, ""), None, outputs, queue=False).then(
            reconstruct, [photo, resolution, threshold], outputs, concurrency_limit=1, preprocess=False
        )
    return page.queue(max_size=QUEUE, api_open=False)
