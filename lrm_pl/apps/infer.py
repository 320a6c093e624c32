"""``lrm infer IMAGE...``: from a photo to a mesh, an orbit, and a record of what was done with what.

Of each image OUT/NAME gets mesh.glb, orbit.mp4, grid.png, input.png (what the network saw) and result.json.
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

from lrm_pl.apps.options import add_background, add_network
from lrm_pl.errors import InputError
from lrm_pl.inference.locate import locate_network
from lrm_pl.inference.mesh_options import TEXTURE_FACES, MeshOptions
from lrm_pl.meshing.mesh import MESH_FORMATS
from lrm_pl.paths import require_out, user_path

#: Endings of the files of a folder that are taken for images.
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")


def find_images(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """List the images that are named, those in the folders that are, and those that patterns such as in/*.png fit.

    Returns:
        Name of the result's folder -> image: the image's name without its ending, with it where two would have
        one name, and with its folder's name before it where that is not enough; and files of the folders that are
        passed over.

    Raises:
        InputError: A path is neither, a folder has none, or two results would have one name.
    """
    found, others = list[Path](), list[Path]()
    for path in (path for typed in paths for path in _fitting(typed)):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if not file.is_dir() and file.name[0] != ".")
            inside = [file for file in files if file.suffix.lower() in ENDINGS]
            if not inside:
                raise InputError(expected=f"images ({', '.join(ENDINGS)}) in {path}", found="none")
            found += inside
            others += [file for file in files if file not in inside]
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(
                expected=f"an image or a folder of images at {path}",
                found="neither",
                remedy="correct the path",
            )
    if bad := [path for path in found if path.stem in (".", "..")]:
        raise InputError(expected="images with a name of their own", found=bad[0], remedy="rename it")
    named = dict[str, Path]()
    found = list({path.absolute(): path for path in found}.values())
    for path in found:
        same = [other for other in found if other.stem == path.stem]
        alike = [other for other in same if other.name == path.name]
        name = (
            path.stem
            if len(same) == 1
            else path.name
            if len(alike) == 1
            else f"{path.absolute().parent.name}-{path.name}"
        )
        if name in named:
            raise InputError(
                expected="images of different names",
                found=f"{named[name]} and {path}, which would both write into OUT/{name}",
                remedy="rename one",
            )
        named[name] = path
    return named, others


def _fitting(path: Path) -> list[Path]:
    """Expand a glob pattern that the shell has not expanded; a path that is no pattern is returned as it is."""
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path)))) or [path]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", module="onnxruntime|rembg")
    console = Console(soft_wrap=True, markup=False)
    try:
        images, others = find_images(given.image)
        wishes = _wishes(given)
        locate_network(given.ckpt)
        require_out(given.out)
        from lrm_pl.inference.background import RemoverError
        from lrm_pl.inference.find_model import open_network
        from lrm_pl.inference.reconstruction import infer, require_video

        if wishes.frames:
            require_video()
        trained = open_network(given)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    at = "" if trained.step is None else f", step {trained.step}"
    console.print(f"Network: {trained.source}{at}, on {next(trained.model.parameters()).device}")
    if trained.note:
        console.print(trained.note)
    if others:
        console.print(f"Passed over, as no image by its ending: {', '.join(map(str, others))}")
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
            out = given.out / name
            say = functools.partial(_say, bar, task, name[:12])
            try:
                record = infer(trained, image, out, wishes, say)
            except RemoverError as error:  # as of all images that need it
                sys.exit(f"lrm: {image}: {error}")
            except (InputError, OSError) as error:
                failed += 1
                told = str(error)
                console.print(told if told.startswith(str(image)) else f"{image}: {told}")
            else:
                _print_result(console, out, record)
            bar.advance(task)
    if failed:
        sys.exit(f"lrm: {failed} of {len(images)} images failed; their reasons stand above")


def _say(bar: Progress, task: TaskID, name: str, what: str) -> None:
    bar.update(task, description=f"{name}: {what}")


def _print_result(console: Console, out: Path, record: dict[str, Any]) -> None:
    mesh, seconds = record["mesh"], record["seconds"]
    told = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    console.print(
        f"{out}: {', '.join(record['files'])}; {mesh['faces']} faces at density {record['threshold']:.3g}\n"
        f"  background: {record['background']}; seconds: {told}"
    )
    for note in record["notes"]:
        console.print(f"  note: {note}")


def _wishes(given: argparse.Namespace) -> MeshOptions:
    names = {field.name for field in dataclasses.fields(MeshOptions)} & set(vars(given))
    return MeshOptions(**{name: getattr(given, name) for name in names} | {"formats": tuple(given.formats)})


def _side(text: str) -> int:
    """Read what follows --texture, which takes the next word where that is no option."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"expected pixels or nothing, but found {text!r}. Name images before it: lrm infer IMAGE --texture"
        )
    return int(text)


def _format(text: str) -> str:
    """Read what follows --formats, which takes all words up to the next option."""
    if text not in MESH_FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(MESH_FORMATS)}, but found {text!r}. Name images before it: "
            f"lrm infer IMAGE "
            "--formats glb obj"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    usual = MeshOptions()
    parser = argparse.ArgumentParser(prog="lrm infer", description=__doc__)
    parser.add_argument(
        "image",
        metavar="IMAGE",
        type=user_path,
        nargs="+",
        help="an image, a folder of images, or 'in/*.png'",
    )
    parser.add_argument("--out", type=user_path, default=Path("out"), help="folder of the results (out)")
    add_network(parser)
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--resolution", type=int, default=usual.resolution, help="points along each axis (256)")
    mesh.add_argument("--threshold", type=float, help="density of the surface; found out unless given")
    mesh.add_argument(
        "--floaters",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out parts of less than this share of the largest part's area (0: keep all)",
    )
    mesh.add_argument("--faces", dest="most_faces", type=int, help="faces at most; all unless given")
    mesh.add_argument(
        "--texture",
        type=_side,
        nargs="?",
        const=1024,
        default=0,
        metavar="SIDE",
        help=f"bake a texture of about so many pixels (1024), at most {TEXTURE_FACES} faces unless --faces says more",
    )
    mesh.add_argument(
        "--texture-limit",
        dest="texture_limit_s",
        type=float,
        default=usual.texture_limit_s,
        metavar="SECONDS",
        help="time for laying out the surface; after it, colors stay at the vertices (60)",
    )
    mesh.add_argument(
        "--formats",
        nargs="+",
        type=_format,
        default=usual.formats,
        metavar="FORMAT",
        help=f"files, of {', '.join(MESH_FORMATS)} (glb)",
    )
    camera = parser.add_argument_group("camera of the image; that of training unless given")
    camera.add_argument("--distance", type=float, help="from the object's middle, scene units")
    camera.add_argument("--fov", dest="fov_deg", metavar="FOV", type=float, help="field of view, degrees")
    orbit = parser.add_argument_group("orbit")
    orbit.add_argument("--frames", type=int, default=usual.frames, help="how many (60); 0: no orbit, no grid")
    orbit.add_argument("--size", type=int, default=usual.size, help="side of a frame, pixels (256)")
    orbit.add_argument(
        "--elevation", dest="elevation_deg", type=float, default=usual.elevation_deg, help="degrees (15)"
    )
    add_background(parser)
    return parser
