"""``lrm infer PICTURE...``: from a photo to a mesh, an orbit, and a record of what was done with what.

Of each picture OUT/NAME gets mesh.glb, orbit.mp4, grid.png, input.png (what the network saw) and result.json.
"""

import argparse
import dataclasses
import functools
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lrm_pl import __version__
from lrm_pl.apps.options import add_background, add_network, open_network
from lrm_pl.apps.paths import require_out, user_path
from lrm_pl.apps.train import git_commit
from lrm_pl.apps.trained import Trained
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.inference import Scene, as_pixels, as_tensor
from lrm_pl.io.orbit_files import encode_video, grid
from lrm_pl.meshes.files import MESH_FORMATS, MeshFormat, encode_mesh
from lrm_pl.meshes.mesh import Mesh
from lrm_pl.meshes.unwrap import UnwrapError
from lrm_pl.stages import Listener, listening, stage

#: Endings of the files of a folder that are taken for pictures.
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")

#: Faces that a mesh may have before it is laid out for a texture: xatlas' time grows faster than they do.
TEXTURE_FACES = 20_000


#: Faces that may be asked for.
MOST_FACES = 10**8


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What is made of a picture.

    Attributes:
        resolution: Points of the lattice along each axis.
        threshold: Density of the surface; None: the network's own, or measured.
        floaters: Parts of less than this share of the largest one's area are left out.
        most_faces: Faces of the mesh at most; None: as many as there are, ``TEXTURE_FACES`` with a texture.
        texture: Side of the texture, about, pixels; 0: colours at the vertices.
        texture_limit_s: Seconds that laying the surface out for it may take.
        formats: Files of the mesh.
        frames: Of the orbit; 0: no orbit and no grid.
        size: Side of a frame.
        elevation_deg: Height of the orbit.
        camera: The camera that the picture is taken to be seen by; None: that of training.
    """

    resolution: int = 256
    threshold: float | None = None
    floaters: float = 0.0
    most_faces: int | None = None
    texture: int = 0
    texture_limit_s: float = 60.0
    formats: tuple[MeshFormat, ...] = ("glb",)
    frames: int = 60
    size: int = 256
    elevation_deg: float = 15.0
    camera: InputCamera | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, value, low, high in (
            ("resolution", self.resolution, 8, 1024),
            ("floaters", self.floaters, 0, 1),
            ("faces", 4 if self.most_faces is None else self.most_faces, 4, MOST_FACES),
            ("texture", self.texture, 0, 8192),
            ("texture-limit", self.texture_limit_s, 0, 86_400),
            ("frames", self.frames, 0, 10_000),
            ("size", self.size, 8, 4096),
            ("elevation", self.elevation_deg, -89, 89),
        ):
            if not low <= value <= high:
                raise InputError(f"expected {name} from {low} to {high}, found {value:g}")


def make_mesh(scene: Scene, wishes: Wishes) -> tuple[Mesh, list[str]]:
    """Make the mesh of an object.

    Returns:
        The mesh, and what was not as it was wished.

    Raises:
        NoSurfaceError: There is no surface.
    """
    most = TEXTURE_FACES if wishes.most_faces is None and wishes.texture else wishes.most_faces
    mesh = scene.mesh(wishes.threshold, wishes.resolution, floaters=wishes.floaters, most_faces=most)
    notes = []
    if most is not None and len(mesh.faces) > most:
        notes.append(f"{len(mesh.faces)} faces instead of {most}: fewer would tear the surface")
    if not wishes.texture:
        return mesh, notes
    try:
        return scene.textured(mesh, wishes.texture, wishes.texture_limit_s), notes
    except UnwrapError as error:
        return mesh, [*notes, f"colours at the vertices instead of a texture: {error}"]


def infer(
    trained: Trained, picture: Path, out: Path, wishes: Wishes, listener: Listener | None = None
) -> dict[str, Any]:
    """Make everything of one picture.

    Args:
        trained: The network.
        picture: The file.
        out: Folder of the results; files of an earlier result, which its result.json lists, are replaced or removed.
            result.json comes last.
        wishes: What is made.
        listener: Told what is being done.

    Returns:
        What result.json holds.

    Raises:
        InputError: It is no picture, there is no surface, or a file in OUT is not of an earlier result.
    """
    model = trained.model
    earlier = _files_of(out)
    _require_own(out, _files_for(wishes), earlier)
    files = dict[str, bytes]()
    with listening(listener, trained.wait) as seconds:
        framed = model.picture(picture)
        scene = model(as_tensor(framed), wishes.camera)
        mesh, notes = make_mesh(scene, wishes)
        with stage("files"):
            for kind in wishes.formats:
                files |= encode_mesh(mesh, kind)
            files["input.png"] = _png(framed)
        if wishes.frames:
            with stage("orbit"):
                frames = [
                    as_pixels(frame)
                    for frame in scene.orbit(wishes.frames, wishes.size, wishes.elevation_deg)
                ]
            with stage("files"):
                files["orbit.mp4"] = encode_video(frames)
                files["grid.png"] = _png(grid(framed, frames))
    record = {
        "picture": str(picture),
        "network": {"source": trained.source, "step": trained.step, "sha256": trained.sha256},
        "background": model.remover.what if "background" in seconds else "transparent already",
        "camera": dataclasses.asdict(scene.camera),
        "setup": dataclasses.asdict(model.setup),
        "threshold": scene.threshold if wishes.threshold is None else wishes.threshold,
        "mesh": {
            "vertices": len(mesh.vertices),
            "faces": len(mesh.faces),
            "texture": None if mesh.texture is None else list(mesh.texture.image.shape[1::-1]),
        },
        "wishes": dataclasses.asdict(wishes),
        "notes": [trained.note, *notes] if trained.note else notes,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "files": sorted(files),
        "device": str(next(model.parameters()).device),
        "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
    }
    _require_own(out, files, earlier)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    for name in earlier - set(files):  # of an earlier picture, or other wishes
        (out / name).unlink(missing_ok=True)
    write_atomically(out / "result.json", (json.dumps(record, indent=2) + "\n").encode())
    return record


def _files_for(wishes: Wishes) -> set[str]:
    """Return the files that a picture will surely get."""
    orbit = {"orbit.mp4", "grid.png"} if wishes.frames else set[str]()
    return {"input.png", "result.json", *(f"mesh.{kind}" for kind in wishes.formats)} | orbit


def _files_of(out: Path) -> set[str]:
    """Return the files of an earlier result; those that result.json lists, and itself."""
    try:
        files = json.loads((out / "result.json").read_text())["files"]
        return {name for name in files if isinstance(name, str) and name == Path(name).name} | {"result.json"}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _require_own(out: Path, files: Iterable[str], earlier: set[str]) -> None:
    """Refuse to write over files that are of no earlier result.

    Raises:
        InputError: There are some.
    """
    if foreign := sorted(name for name in files if name not in earlier and (out / name).exists()):
        raise InputError(
            f"expected only files of an earlier `lrm infer` in {out}, found {', '.join(foreign)}, which its "
            "result.json does not list; move them away, or give another --out"
        )


def find_pictures(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """List the pictures that are named, and those in the folders that are.

    Returns:
        Name of the result's folder -> picture: the picture's name without its ending, with it where two would have
        one name, and with its folder's name before it where that is not enough; and files of the folders that are
        passed over.

    Raises:
        InputError: A path is neither, a folder has none, or two results would have one name.
    """
    found, others = list[Path](), list[Path]()
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
            inside = [file for file in files if file.suffix.lower() in ENDINGS]
            if not inside:
                raise InputError(f"expected pictures ({', '.join(ENDINGS)}) in {path}, found none")
            found += inside
            others += [file for file in files if file not in inside]
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(
                f"expected a picture or a folder of pictures at {path}, found neither; correct the path"
            )
    if bad := [path for path in found if path.stem in (".", "..")]:
        raise InputError(f"expected pictures with a name of their own, found {bad[0]}; rename it")
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
                f"expected pictures of different names, found {named[name]} and {path}, which would both write into "
                f"OUT/{name}; rename one"
            )
        named[name] = path
    return named, others


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    given = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", module="onnxruntime|rembg")
    console = Console(soft_wrap=True, markup=False)
    try:
        pictures, others = find_pictures(given.picture)
        wishes = _wishes(given)
        require_out(given.out)
        trained = open_network(given)
        if wishes.camera is None and (given.distance is not None or given.fov is not None):
            setup = trained.model.setup
            camera = InputCamera(
                setup.distance if given.distance is None else given.distance,
                setup.fov_deg if given.fov is None else given.fov,
            )
            wishes = dataclasses.replace(wishes, camera=camera)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    at = "" if trained.step is None else f", step {trained.step}"
    console.print(f"Network: {trained.source}{at}, on {next(trained.model.parameters()).device}")
    if trained.note:
        console.print(trained.note)
    if others:
        console.print(f"Passed over, as no picture by its ending: {', '.join(map(str, others))}")
    failed = 0
    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(pictures))
        for name, picture in pictures.items():
            out = given.out / name
            say = functools.partial(_say, bar, task, name[:12])
            try:
                record = infer(trained, picture, out, wishes, say)
            except (InputError, OSError) as error:
                failed += 1
                told = str(error)
                console.print(told if told.startswith(str(picture)) else f"{picture}: {told}")
            else:
                _print_result(console, out, record)
            bar.advance(task)
    if failed:
        sys.exit(f"lrm: {failed} of {len(pictures)} pictures gave nothing; their reasons stand above")


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


def _wishes(given: argparse.Namespace) -> Wishes:
    names = {field.name for field in dataclasses.fields(Wishes)} & set(vars(given))
    return Wishes(**{name: getattr(given, name) for name in names} | {"formats": tuple(given.formats)})


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _parser() -> argparse.ArgumentParser:
    usual = Wishes()
    parser = argparse.ArgumentParser(prog="lrm infer", description=__doc__)
    parser.add_argument(
        "picture", metavar="PICTURE", type=user_path, nargs="+", help="a picture, or a folder of pictures"
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
        type=int,
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
        help="time for laying out the surface; after it, colours stay at the vertices (60)",
    )
    mesh.add_argument("--formats", nargs="+", choices=MESH_FORMATS, default=usual.formats, help="files (glb)")
    camera = parser.add_argument_group("camera of the picture; that of training unless given")
    camera.add_argument("--distance", type=float, help="from the object's middle, scene units")
    camera.add_argument("--fov", type=float, help="field of view, degrees")
    orbit = parser.add_argument_group("orbit")
    orbit.add_argument("--frames", type=int, default=usual.frames, help="how many (60); 0: no orbit, no grid")
    orbit.add_argument("--size", type=int, default=usual.size, help="side of a frame, pixels (256)")
    orbit.add_argument(
        "--elevation", dest="elevation_deg", type=float, default=usual.elevation_deg, help="degrees (15)"
    )
    add_background(parser)
    return parser
