"""lrm_pl: train Large Reconstruction Models (one image -> triplane NeRF) with Lightning.

Importing this package loads nothing else, so that the rendering tools, which share its conventions and its shard
schema, never pull in torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - depends on the name
    """Import ``LRMPipeline``, the class of trained models, at first access."""
    if name == "LRMPipeline":
        return importlib.import_module("lrm_pl.inference.pipeline").LRMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
