"""The page of ``lrm demo``."""

import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from lrm_pl.errors import InputError
from lrm_pl.images import open_image
from lrm_pl.inference.find_model import Trained
from lrm_pl.inference.mesh_options import MeshOptions
from lrm_pl.inference.reconstruction import make_mesh
from lrm_pl.inference.scene import as_pixels, as_tensor
from lrm_pl.inference.video import encode_video
from lrm_pl.meshing.glb import encode_glb
from lrm_pl.progress import listening, stage

#: Images to begin with: renders of the CC0 demo objects.
EXAMPLES = Path(__file__).with_name("examples")

#: Size of an upload, and pixels of an image.
MEGABYTES, MEGAPIXELS = 16, 25

#: Visitors that may wait.
QUEUE = 16

#: Points of the lattice along each axis; densities of the surface, 0: found out.
RESOLUTIONS, THRESHOLDS = (64, 384), (0, 60)

#: Frames of the orbit, and their side.
_FRAMES, _SIDE = 36, 256

#: Seconds that a visitor's files are kept, and how often old ones are looked for.
KEPT_S, SWEEP_S = 3600, 600


def refuse_addresses(data: Any) -> None:  # noqa: ANN401 - JSON
    """Refuse files that a request names by a URL, which gradio would fetch.

    Args:
        data: What a visitor sent.

    Raises:
        gradio.Error: There is one.
    """
    import gradio as gr

    if isinstance(data, list):
        for part in data:
            refuse_addresses(part)
    elif isinstance(data, dict):
        path = data.get("path")
        if isinstance(path, str) and "://" in path:
            raise gr.Error(f"Expected an uploaded image, but found the address {path}; upload it.")
        refuse_addresses(list(data.values()))


def require_within(bounds: tuple[int, int], found: Any, what: str) -> float:  # noqa: ANN401 - JSON
    """Return a number that a visitor sent.

    Raises:
        InputError: It is none, or out of bounds.
    """
    low, high = bounds
    if not isinstance(found, int | float) or not low <= found <= high:
        raise InputError(expected=f"{low} to {high} {what}", found=f"{found!r}.")
    return found


def make_page(trained: Trained, folder: Path) -> Any:  # noqa: ANN401 - a gradio.Blocks
    """Make the page.

    Args:
        trained: The network.
        folder: Where files for visitors are written; the page's own cache takes them over.
    """
    import gradio as gr

    class Page(gr.Blocks):  # type: ignore[misc]
        async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any) -> Any:  # noqa: ANN401 - gradio's
            refuse_addresses(inputs)
            return await super().preprocess_data(block_fn, inputs, *more, **options)

    def make(
        photo: dict[str, Any] | None,
        resolution: float,
        threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio wants it there
    ) -> tuple[Any, ...]:
        if photo is None or photo["path"] is None:
            raise gr.Error("Choose an image first.", title="No image", print_exception=False)
        done = 0

        def show(name: str) -> None:
            nonlocal done
            done += 1
            progress(min(0.95, done / 12), desc=name)

        try:
            with listening(show):
                resolution = int(require_within(RESOLUTIONS, resolution, "points along each axis"))
                threshold = require_within(THRESHOLDS, threshold, "as the surface's density")
                image = open_image(
                    Path(photo["path"]),
                    "This file",
                    max_bytes=MEGABYTES * 10**6,
                    max_pixels=MEGAPIXELS * 10**6,
                )
                framed = trained.model.preprocess(image)
                scene = trained.model(as_tensor(framed))
                wishes = MeshOptions(threshold=threshold or None, resolution=resolution, floaters=0.01)
                mesh, _ = make_mesh(scene, wishes)
                with stage("orbit"):
                    frames = [as_pixels(frame) for frame in scene.orbit(_FRAMES, _SIDE, 15.0)]
                place = Path(tempfile.mkdtemp(dir=folder))
                (place / "mesh.glb").write_bytes(encode_glb(mesh))
                (place / "orbit.mp4").write_bytes(encode_video(frames))
        except InputError as error:
            raise gr.Error(
                str(error), title="That did not work", duration=None, print_exception=False
            ) from error
        density = threshold or scene.threshold
        told = f"{len(mesh.faces):,} triangles; the surface lies at density {density:.3g}."
        white = Image.alpha_composite(Image.new("RGBA", framed.size, "white"), framed).convert("RGB")
        glb = str(place / "mesh.glb")
        return white, str(place / "orbit.mp4"), glb, glb, told

    with Page(title="lrm", analytics_enabled=False, delete_cache=(SWEEP_S, KEPT_S)) as page:
        gr.Markdown(
            f"# From a photo to a 3D file\n`{trained.source}` (LRM, arXiv 2311.04400). One object, wholly in its "
            "image: where nothing is transparent, its background is taken out."
        )
        with gr.Row():
            with gr.Column(scale=1):
                photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=280, elem_id="photo")
                resolution = gr.Slider(
                    *RESOLUTIONS, 192, step=32, label="Points of the lattice along each axis"
                )
                threshold = gr.Slider(*THRESHOLDS, 0, step=0.5, label="Density of the surface (0: found out)")
                button = gr.Button("Reconstruct", variant="primary", elem_id="go")
                gr.Examples(
                    [[str(path)] for path in sorted(EXAMPLES.glob("*.png"))], [photo], label="Examples"
                )
            with gr.Column(scale=2):
                with gr.Row():
                    seen = gr.Image(
                        label="What the network sees", height=280, interactive=False, elem_id="seen"
                    )
                    orbit = gr.Video(label="Orbit", height=280, autoplay=True, loop=True, elem_id="orbit")
                mesh = gr.Model3D(label="Mesh", height=380, clear_color=(1, 1, 1, 1), elem_id="mesh")
                told = gr.Markdown(elem_id="told")
                download = gr.DownloadButton("Download mesh.glb", elem_id="download")
        # Files and numbers come as they were sent: we look at them with care ourselves, and say what is wrong.
        shown = [seen, orbit, mesh, download, told]
        # First nothing: what is shown next, or an error, is not beside another image's mesh.
        button.click(lambda: (None, None, None, None, ""), None, shown, queue=False).then(
            make, [photo, resolution, threshold], shown, concurrency_limit=1, preprocess=False
        )
    return page.queue(max_size=QUEUE, api_open=False)
