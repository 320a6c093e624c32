"""Options that several commands share. Imports nothing heavy: what is wrong with a command is said at once."""

import argparse
import dataclasses
import math
import re
import socket
from pathlib import Path

from lrm_pl.apps.paths import user_path
from lrm_pl.errors import InputError
from lrm_pl.meshes.mesh import MeshFormat
from lrm_pl.stores import HUB

#: Where `lrm fit` puts runs that were given no folder.
RUNS = Path("runs/lrm")

_VERSION, _CHECKPOINT = re.compile(r"version_\d+"), re.compile(r"step-\d{8,}")


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
        distance: Of the camera that the picture is taken to be seen by, from the object's middle, scene units; None:
            that of training.
        fov_deg: Field of view of that camera; None: that of training.
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
    distance: float | None = None
    fov_deg: float | None = None

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
        distance = 1.0 if self.distance is None else self.distance
        fov = 90.0 if self.fov_deg is None else self.fov_deg
        if not 0 < distance < math.inf or not 0 < fov < 180:
            raise InputError(
                f"expected a distance above 0 and a fov_deg between 0 and 180, found {distance:g} and {fov:g}"
            )
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise InputError(f"expected a threshold above 0, found {self.threshold:g}")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a trained network."""
    parser.add_argument(
        "--ckpt",
        metavar="CKPT",
        help="a run's folder, a checkpoint (a path or a URL), a folder of `lrm export`, or hf://owner/name on "
        "the Hugging Face hub; unless given, the newest run in runs/lrm",
    )
    parser.add_argument(
        "--config", type=user_path, help="the run's config.yaml, where it is not above the checkpoint"
    )
    parser.add_argument(
        "--average", action="store_true", help="the run's moving average instead of its weights"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... (auto)")


def add_background(parser: argparse.ArgumentParser) -> None:
    """Add the options of taking backgrounds out."""
    rembg = parser.add_argument_group("taking out the background of pictures without alpha")
    rembg.add_argument(
        "--rembg-model", metavar="FILE", help="an ONNX file of U^2-Net; found or downloaded unless given"
    )
    rembg.add_argument("--rembg-sha256", metavar="HEX", help="its hash, where it is another one")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the options of where a page is served."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; this machine only unless given"
    )
    parser.add_argument("--port", type=int, default=port, help=f"port to listen at ({port})")


def url_of(host: str, port: int) -> str:
    """Return the URL of an address; an IPv6 address stands in brackets there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def require_free(host: str, port: int) -> None:
    """Make sure, before a network is read, that a command can listen where it is to.

    Raises:
        InputError: It cannot.
    """
    if port == 0:  # the system would choose one, after the address was printed
        raise InputError(f"expected to listen at a port of {host}, found port 0; choose one: --port 8000")
    try:
        # A name may have several addresses, and a server listens at all of them.
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that ended lingers
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"expected to listen at {host}:{port}, found: {error}; choose another: --host, --port"
        ) from error


def locate_network(name: str | None) -> str:
    """Make sure that something lies where a network is said to be, before anything is imported that reads it.

    Args:
        name: What `--ckpt` names; None: the newest run in ``runs/lrm``.

    Returns:
        The name.

    Raises:
        InputError: There is nothing.
    """
    name = name or newest_run()
    if "://" not in name and not Path(name).expanduser().exists():
        raise InputError(
            f"expected a run, a checkpoint or a folder of `lrm export`, found nothing at {name}; correct the path, or "
            f"say {HUB}owner/name for a network on the Hugging Face hub"
        )
    return name


def newest_run() -> str:
    """Return the newest run in ``runs/lrm`` that has a checkpoint.

    Raises:
        InputError: There is none.
    """
    runs = [
        path
        for path in RUNS.glob("version_*")
        if _VERSION.fullmatch(path.name)
        and any(_CHECKPOINT.fullmatch(found.name) for found in path.glob("checkpoints/step-*"))
    ]
    if not runs:
        raise InputError(
            f"expected a trained network in {RUNS}, found none; train the demo (make train, ten minutes), or name a "
            "run, a checkpoint, or a folder of `lrm export`: CKPT=... (--ckpt)"
        )
    return str(max(runs, key=lambda path: int(path.name.removeprefix("version_"))))
