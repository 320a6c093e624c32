"""Options that several commands share.

Importing this module does not import torch, so that invalid commands are reported immediately.
"""

import argparse
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from lrm_pl.errors import InputError
from lrm_pl.inference.find_model import find_model
from lrm_pl.paths import user_path

if TYPE_CHECKING:
    from lrm_pl.inference.pipeline import LRMPipeline


def fail(error: object) -> NoReturn:
    """Print an error message and exit with status 1."""
    sys.exit(f"lrm: {error}")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a trained model."""
    parser.add_argument(
        "--ckpt",
        help="run folder, checkpoint (path or URL), folder of `lrm export`, or hf://owner/name on the Hugging Face "
        "Hub (default: the newest run in runs/lrm)",
    )
    parser.add_argument("--config", type=user_path, help="the run's config.yaml, if not in the run folder")
    parser.add_argument("--average", action="store_true", help="use the moving average of the weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def add_background(parser: argparse.ArgumentParser) -> None:
    """Add the options for background removal."""
    rembg = parser.add_argument_group("background removal")
    rembg.add_argument(
        "--rembg-model", metavar="FILE", help="ONNX file of U^2-Net (default: found or downloaded)"
    )
    rembg.add_argument("--rembg-sha256", metavar="HEX", help="sha256 of a custom file")


def load_pipeline(args: argparse.Namespace) -> "LRMPipeline":
    """Load the model that the options of ``add_model`` and ``add_background`` select.

    Raises:
        InputError: The model does not exist, or the weights do not match the config.
    """
    from lrm_pl.inference.background import BackgroundRemover
    from lrm_pl.inference.pipeline import LRMPipeline
    from lrm_pl.kernels.device import choose_device

    device = choose_device(args.device)
    remover = BackgroundRemover(path=args.rembg_model, sha256=args.rembg_sha256)
    return LRMPipeline.from_pretrained(
        find_model(args.ckpt), average=args.average, config=args.config, remover=remover
    ).to(device)


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the options for the address of a server."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port})")


def format_url(host: str, port: int) -> str:
    """Return the URL of an address. IPv6 addresses are enclosed in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def require_free(host: str, port: int) -> None:
    """Check that a server can listen on an address.

    Raises:
        InputError: The address is invalid or in use.
    """
    if port == 0:  # the operating system would choose a port, which the printed URL would not contain
        raise InputError(
            expected=f"a port of {host} to listen on", found="port 0", remedy="choose one: --port 8000"
        )
    try:
        # A name may resolve to several addresses, and servers listen on all of them.
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore sockets in TIME_WAIT
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"Cannot listen on {host}:{port}: {error}. Choose another address: --host, --port"
        ) from error
