"""lrm_pl: train Large Reconstruction Models (one image -> triplane NeRF) with Lightning.

Importing this package loads nothing else, so that the rendering tools, which share its conventions and its shard
schema, never pull in torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - what is asked for
    """Load ``LRM``, a trained network with all that it takes to use it, when it is first asked for."""
    if name == "LRM":
        return importlib.import_module("lrm_pl.inference.pipeline").PretrainedLRM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
