"""Options that several commands share, and what they come to."""

import argparse
import socket

from lrm_pl.apps.paths import user_path
from lrm_pl.apps.trained import Trained, open_trained
from lrm_pl.errors import InputError
from lrm_pl.io.background import BackgroundRemover


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


def require_free(host: str, port: int) -> None:
    """Make sure, before a network is read, that a command can listen where it is to.

    Raises:
        InputError: It cannot.
    """
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


def open_network(given: argparse.Namespace, device: str | None = None) -> Trained:
    """Open the network that the options name, with what takes backgrounds out.

    Args:
        given: Parsed options of ``add_network``, and of ``add_background`` where pictures come from outside.
        device: In place of ``--device``.

    Raises:
        InputError: There is none, or it is not what it should be.
    """
    remover = None
    if hasattr(given, "rembg_model"):
        remover = BackgroundRemover(path=given.rembg_model, sha256=given.rembg_sha256)
    return open_trained(
        given.ckpt, average=given.average, device=device or given.device, remover=remover, config=given.config
    )
