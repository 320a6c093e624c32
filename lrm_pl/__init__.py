"""Training of Large Reconstruction Models (single image to triplane NeRF) with Lightning.

Importing this package does not import torch, so that ``data_tools`` can use ``lrm_pl.conventions`` and the shard schema
in environments without torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - depends on the name
    """Import ``LRMPipeline`` when it is first accessed."""
    if name == "LRMPipeline":
        return importlib.import_module("lrm_pl.inference.pipeline").LRMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
