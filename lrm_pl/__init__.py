"""lrm_pl: train Large Reconstruction Models (one image -> triplane NeRF) with Lightning.

Importing this package loads nothing else, so that the rendering tools, which share its conventions and its shard
schema, never pull in torch.
"""

__version__ = "0.1.0"
