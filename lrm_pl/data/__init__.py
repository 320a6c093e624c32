"""Shards on disk -> batches. ``schema`` and ``manifest`` never import torch: the rendering tools share them."""
