"""Options and checks that several commands share.

Importing this module does not import torch, so that invalid commands are reported immediately.
"""

import argparse
import importlib.util
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lrm_pl.errors import InputError
from lrm_pl.inference.find_model import find_model
from lrm_pl.paths import user_path

if TYPE_CHECKING:
    from lrm_pl.inference.pipeline import LRMPipeline


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a trained model."""
    parser.add_argument(
        "--ckpt",
        help="run folder, checkpoint (path or URL), model folder that `lrm export` created, or hf://owner/name on "
        "the Hugging Face Hub (default: the newest run in runs/lrm)",
    )
    parser.add_argument(
        "--config", type=user_path, help="config.yaml of the run, if the file is not in the run folder"
    )
    parser.add_argument("--average", action="store_true", help="use the moving average of the weights")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option for the device of the model."""
    parser.add_argument(
        "--device",
        default="auto",
        help="device of the model, such as auto, cpu or cuda (default: %(default)s)",
    )


def add_background(parser: argparse.ArgumentParser) -> None:
    """Add the options for background removal."""
    group = parser.add_argument_group("background removal")
    group.add_argument(
        "--rembg-model", metavar="FILE", help="ONNX file of U^2-Net (default: the cached file, or a download)"
    )
    group.add_argument("--rembg-sha256", metavar="HEX", help="SHA-256 of a custom ONNX file")


def add_fields(
    group: argparse._ArgumentGroup, defaults: object, options: Iterable[tuple[str, str, type, str]]
) -> None:
    """Add options that set the fields of a dataclass.

    Args:
        group: Group of the options.
        defaults: Instance of the dataclass with the default values.
        options: Flag, name of the field, type and help text of each option. The default is appended to the help text
            unless it is None.
    """
    for flag, name, kind, text in options:
        default = getattr(defaults, name)
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(flag, dest=name, type=kind, default=default, metavar="N", help=text + shown)


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
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="port to listen on (default: %(default)s)")


def format_url(host: str, port: int) -> str:
    """Return the URL of an address. IPv6 addresses are enclosed in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def require_packages(command: str, *names: str) -> None:
    """Check that the optional packages of a command are installed.

    Raises:
        InputError: A package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"lrm {command} requires the package {name}", remedy=f"run pip install -e '.[{command}]'"
            )


def require_free(host: str, port: int) -> None:
    """Check that a server can listen on an address.

    Raises:
        InputError: The address is invalid or in use.
    """
    if port == 0:  # the operating system would choose a port, which the printed URL would not contain
        raise InputError(
            expected="a port number of at least 1", found=port, remedy="choose a port, such as --port 8000"
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
            f"Cannot listen on {host}:{port}: {error}", remedy="choose another address with --host and --port"
        ) from error
