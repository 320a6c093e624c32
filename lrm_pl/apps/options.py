"""Options that several commands share. Imports nothing heavy: what is wrong with a command is said at once."""

import argparse
import socket

from lrm_pl.errors import InputError
from lrm_pl.paths import user_path


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
    rembg = parser.add_argument_group("taking out the background of images without alpha")
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
        raise InputError(
            expected=f"to listen at a port of {host}", found="port 0", remedy="choose one: --port 8000"
        )
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
            expected=f"to listen at {host}:{port}", found=error, remedy="choose another: --host, --port"
        ) from error
