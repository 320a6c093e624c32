"""Reconstruct meshes from photos.

The result of each image is a folder OUT/NAME with mesh.glb, orbit.mp4, grid.png, input.png (the input of the network)
and result.json.
"""

import argparse
import dataclasses
import functools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from lrm_pl.apps.options import add_background, add_fields, add_model, load_pipeline
from lrm_pl.errors import InputError, counted, exit_on_error
from lrm_pl.inference.find_images import find_images
from lrm_pl.inference.find_model import find_model
from lrm_pl.inference.options import TEXTURE_FACES, TEXTURE_SIDE, MeshOptions
from lrm_pl.meshing.mesh import MESH_FORMATS
from lrm_pl.paths import require_out, user_path

#: Options that set the fields of MeshOptions, by group: flag, field, type and help text.
_FIELDS = {
    "mesh": (
        ("--resolution", "resolution", int, "resolution of the density grid"),
        ("--threshold", "threshold", float, "density at the surface (default: estimated)"),
        ("--floaters", "floaters", float, "minimum area of a component, relative to the largest component"),
        ("--faces", "max_faces", int, "maximum number of faces (default: unlimited)"),
        (
            "--texture-limit",
            "texture_limit_s",
            float,
            "time limit of the UV unwrapping in seconds; if the limit is exceeded, the mesh keeps vertex colors",
        ),
    ),
    "assumed camera of the image (default: the camera of training)": (
        ("--distance", "distance", float, "distance from the center of the object in scene units"),
        ("--fov", "fov_deg", float, "field of view in degrees"),
    ),
    "orbit": (
        ("--frames", "frames", int, "number of frames; 0 renders neither an orbit nor a grid"),
        ("--size", "size", int, "side length of a frame in pixels"),
        ("--elevation", "elevation_deg", float, "elevation in degrees"),
    ),
}


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm infer``."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", module="onnxruntime|rembg")
    console = Console(soft_wrap=True, markup=False)
    images, skipped = find_images(args.image)
    fields = dataclasses.fields(MeshOptions)
    args.formats = tuple(args.formats)
    options = MeshOptions(**{field.name: getattr(args, field.name) for field in fields})
    find_model(args.ckpt)
    require_out(args.out)
    from lrm_pl.inference.background import RemoverError
    from lrm_pl.inference.result_folder import infer, require_video

    if options.frames:
        require_video()
    pipeline = load_pipeline(args)
    console.print(f"Model: {pipeline.description}")
    if skipped:
        console.print(f"Skipped files without an image suffix: {', '.join(map(str, skipped))}")
    failed = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(images))
        for name, image in images.items():
            out = args.out / name
            show_stage = functools.partial(_show_stage, bar, task, name[:12])
            try:
                _print_result(console, out, infer(pipeline, image, out, options, show_stage))
            except RemoverError as error:  # all images with a background would fail
                raise InputError(f"{image}: {error}") from error
            except (InputError, OSError) as error:
                failed += 1
                message = str(error)
                console.print(message if message.startswith(str(image)) else f"{image}: {message}")
            bar.advance(task)
    if failed:
        raise InputError(
            f"{failed} of {counted(len(images), 'image')} could not be reconstructed; see the messages above"
        )


def _show_stage(bar: Progress, task: TaskID, name: str, stage: str) -> None:
    bar.update(task, description=escape(f"{name}: {stage}"))


def _print_result(console: Console, out: Path, record: dict[str, Any]) -> None:
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in record["seconds"].items())
    console.print(
        f"{out}: {', '.join(record['files'])}; {record['mesh']['faces']} faces at a density threshold of "
        f"{record['threshold']:.3g}\n  background: {record['background']}; time in seconds: {seconds}"
    )
    for warning in record["warnings"]:
        console.print(f"  warning: {warning}")


def _texture_side(text: str) -> int:
    """Parse the value of --texture.

    Because the value is optional, argparse may pass the path of an image, which is rejected.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"expected a number of pixels or no value, but found {text!r}. Put images before the "
            "option: lrm infer IMAGE --texture"
        )
    return int(text)


def _mesh_format(text: str) -> str:
    """Parse a value of --formats.

    Because the number of values is not fixed, argparse may pass the path of an image, which is rejected.
    """
    if text not in MESH_FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected one of the formats {', '.join(MESH_FORMATS)}, but found {text!r}. Put images before the option: "
            "lrm infer IMAGE --formats glb obj"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm infer", description=__doc__)
    add = parser.add_argument
    add(
        "image",
        metavar="IMAGE",
        type=user_path,
        nargs="+",
        help="image, folder of images, or a pattern such as 'in/*.png'",
    )
    add("--out", type=user_path, default=Path("out"), help="folder of the results (default: %(default)s)")
    add_model(parser)
    defaults = MeshOptions()
    groups = {title: parser.add_argument_group(title) for title in _FIELDS}
    for title, group in groups.items():
        add_fields(group, defaults, _FIELDS[title])
    add = groups["mesh"].add_argument
    add(
        "--texture",
        type=_texture_side,
        nargs="?",
        const=TEXTURE_SIDE,
        default=0,
        metavar="SIDE",
        help=f"bake a texture with a side of about SIDE pixels ({TEXTURE_SIDE} if omitted), and limit the mesh to "
        f"{TEXTURE_FACES} faces unless --faces is given",
    )
    add(
        "--formats",
        nargs="+",
        type=_mesh_format,
        default=defaults.formats,
        metavar="FORMAT",
        help=f"file formats of the mesh: {', '.join(MESH_FORMATS)} (default: glb)",
    )
    add_background(parser)
    return parser
