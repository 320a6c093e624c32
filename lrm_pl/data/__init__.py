"""Reading of shards and creation of batches.

``schema``, ``manifest`` and ``tar`` do not import torch, because the rendering tools import these modules
in an environment without torch.
"""
