"""Reconstruct photos as meshes.

The result of each image is a folder OUT/NAME with mesh.glb, orbit.mp4, grid.png, input.png (the input of the network)
and result.json.
"""

import argparse
import dataclasses
import functools
import glob
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lrm_pl.apps.options import add_background, add_model, fail, load_pipeline
from lrm_pl.errors import InputError
from lrm_pl.inference.find_model import find_model
from lrm_pl.inference.options import TEXTURE_FACES, MeshOptions
from lrm_pl.meshing.mesh import MESH_FORMATS
from lrm_pl.paths import require_out, user_path

#: Suffixes of image files. Files with other suffixes in a folder are skipped.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")


def find_images(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """List the images that a list of paths refers to.

    Args:
        paths: Image files, folders of images, and glob patterns.

    Returns:
        The images by name of the result folder, and the skipped files in the folders. The name of a result folder is
        the stem of the image. If two images have the same stem, the file name is used. If two images have the same
        file name, the names of their folders are prepended.

    Raises:
        InputError: A path does not exist, a folder contains no images, or two results would have the same name.
    """
    found, skipped = list[Path](), list[Path]()
    for path in (match for given in paths for match in _expand(given)):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if not file.is_dir() and file.name[0] != ".")
            images = [file for file in files if file.suffix.lower() in SUFFIXES]
            if not images:
                raise InputError(expected=f"images ({', '.join(SUFFIXES)}) in {path}", found="none")
            found += images
            skipped += [file for file in files if file not in images]
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(
                expected=f"an image or a folder of images at {path}",
                found="neither",
                remedy="correct the path",
            )
    if bad := [path for path in found if path.stem in (".", "..")]:
        raise InputError(expected="images with a file name", found=bad[0], remedy="rename it")
    named = dict[str, Path]()
    found = list({path.absolute(): path for path in found}.values())
    for path in found:
        stems = [other for other in found if other.stem == path.stem]
        names = [other for other in stems if other.name == path.name]
        name = path.stem if len(stems) == 1 else path.name
        if len(names) > 1:
            name = f"{path.absolute().parent.name}-{path.name}"
        if name in named:
            raise InputError(
                expected="images with different names",
                found=f"{named[name]} and {path}, which would both be written to OUT/{name}",
                remedy="rename one",
            )
        named[name] = path
    return named, skipped


def _expand(path: Path) -> list[Path]:
    """Expand a glob pattern. Existing paths and patterns without matches are returned unchanged."""
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path)))) or [path]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", module="onnxruntime|rembg")
    console = Console(soft_wrap=True, markup=False)
    try:
        images, skipped = find_images(args.image)
        names = {field.name for field in dataclasses.fields(MeshOptions)} & set(vars(args))
        options = MeshOptions(
            **{name: getattr(args, name) for name in names} | {"formats": tuple(args.formats)}
        )
        find_model(args.ckpt)
        require_out(args.out)
        from lrm_pl.inference.background import RemoverError
        from lrm_pl.inference.result_folder import infer, require_video

        if options.frames:
            require_video()
        pipeline = load_pipeline(args)
    except (InputError, OSError) as error:
        fail(error)
    console.print(f"Model: {pipeline.description}")
    if skipped:
        console.print(f"Skipped, not images by their suffix: {', '.join(map(str, skipped))}")
    failed = 0
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(images))
        for name, image in images.items():
            out = args.out / name
            try:
                record = infer(
                    pipeline, image, out, options, functools.partial(_show_stage, bar, task, name[:12])
                )
            except RemoverError as error:  # all images with a background would fail
                fail(f"{image}: {error}")
            except (InputError, OSError) as error:
                failed += 1
                message = str(error)
                console.print(message if message.startswith(str(image)) else f"{image}: {message}")
            else:
                _print_result(console, out, record)
            bar.advance(task)
    if failed:
        fail(f"{failed} of {len(images)} images failed; see the messages above")


def _show_stage(bar: Progress, task: TaskID, name: str, stage: str) -> None:
    bar.update(task, description=f"{name}: {stage}")


def _print_result(console: Console, out: Path, record: dict[str, Any]) -> None:
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in record["seconds"].items())
    console.print(
        f"{out}: {', '.join(record['files'])}; {record['mesh']['faces']} faces at density "
        f"{record['threshold']:.3g}\n  background: {record['background']}; seconds: {seconds}"
    )
    for warning in record["warnings"]:
        console.print(f"  warning: {warning}")


def _texture_side(text: str) -> int:
    """Parse the value of --texture.

    Because the value is optional, argparse may pass the path of an image, which is rejected.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"expected a number of pixels or nothing, but found {text!r}. Give images first: lrm infer IMAGE --texture"
        )
    return int(text)


def _mesh_format(text: str) -> str:
    """Parse a value of --formats.

    Because the number of values is not fixed, argparse may pass the path of an image, which is rejected.
    """
    if text not in MESH_FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(MESH_FORMATS)}, but found {text!r}. Give images first: lrm infer IMAGE "
            "--formats glb obj"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm infer", description=__doc__)
    parser.add_argument(
        "image", metavar="IMAGE", type=user_path, nargs="+", help="image, folder of images, or 'in/*.png'"
    )
    parser.add_argument(
        "--out", type=user_path, default=Path("out"), help="folder of the results (default: out)"
    )
    add_model(parser)
    defaults = MeshOptions()
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument(
        "--resolution",
        type=int,
        default=defaults.resolution,
        help="resolution of the density grid (default: 256)",
    )
    mesh.add_argument("--threshold", type=float, help="density at the surface (default: estimated)")
    mesh.add_argument(
        "--floaters",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="remove components with less than this fraction of the largest one's area (default: 0, keep all)",
    )
    mesh.add_argument("--faces", dest="max_faces", type=int, help="maximum number of faces (default: all)")
    mesh.add_argument(
        "--texture",
        type=_texture_side,
        nargs="?",
        const=1024,
        default=0,
        metavar="SIDE",
        help=f"bake a texture of about SIDE pixels (1024); limits the mesh to {TEXTURE_FACES} faces unless --faces "
        "is given",
    )
    mesh.add_argument(
        "--texture-limit",
        dest="texture_limit_s",
        type=float,
        default=defaults.texture_limit_s,
        metavar="SECONDS",
        help="time limit of the UV unwrapping; vertex colors are kept if it is exceeded (default: 60)",
    )
    mesh.add_argument(
        "--formats",
        nargs="+",
        type=_mesh_format,
        default=defaults.formats,
        metavar="FORMAT",
        help=f"file formats: {', '.join(MESH_FORMATS)} (default: glb)",
    )
    camera = parser.add_argument_group("assumed camera of the image (default: that of training)")
    camera.add_argument("--distance", type=float, help="distance from the object's center, scene units")
    camera.add_argument("--fov", dest="fov_deg", metavar="FOV", type=float, help="field of view, degrees")
    orbit = parser.add_argument_group("orbit")
    orbit.add_argument(
        "--frames",
        type=int,
        default=defaults.frames,
        help="number of frames; 0: no orbit, no grid (default: 60)",
    )
    orbit.add_argument(
        "--size", type=int, default=defaults.size, help="side of a frame, pixels (default: 256)"
    )
    orbit.add_argument(
        "--elevation",
        dest="elevation_deg",
        type=float,
        default=defaults.elevation_deg,
        help="degrees (default: 15)",
    )
    add_background(parser)
    return parser
