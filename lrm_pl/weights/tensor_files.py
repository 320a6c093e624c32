"""Read a file of tensors by name that came from outside: safetensors, or torch's own with nothing in it run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lrm_pl.weights.resolve import WeightsError


def read_tensor_file(path: Path, name: str) -> Mapping[Any, Any]:
    """Read tensors by name.

    Args:
        path: A .safetensors file, or a .pth, .pt, .ckpt or .bin that torch wrote (read with ``weights_only``).
        name: What it should hold, for messages.

    Raises:
        WeightsError: It cannot be read, holds something else, or wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise WeightsError(
                subject=name,
                expected=f"{path} to end in .safetensors, .pth, .pt, .ckpt or .bin",
                found=f"{path.suffix!r}",
                remedy="give the file of weights as it was published",
            )
    except (WeightsError, OSError):
        raise
    except Exception as error:  # a damaged file may fail anywhere in the readers
        raise WeightsError(
            subject=name,
            expected=f"tensors by name in {path}",
            found=f"a file that cannot be read as such ({type(error).__name__}: {_first_sentence(error)})",
            remedy="nothing in it was run; get the file again",
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            subject=name,
            expected=f"tensors by name in {path}",
            found=type(content).__name__,
            remedy="save the network's state_dict()",
        )
    return content


def _first_sentence(error: Exception) -> str:
    """Leave out what PyTorch goes on to advise: to run what is in the file."""
    return re.split(r"(?<=[.!?]) |\n", str(error).strip(), maxsplit=1)[0]
