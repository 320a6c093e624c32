"""Sharded, hashed and atomic training checkpoints in a local folder or an object store. See README.md."""

from lrm_pl.checkpoints.files import require_writable
from lrm_pl.checkpoints.index import (
    MODE_SIGNS,
    Checkpoint,
    CheckpointError,
    Mode,
    best_score,
    checkpoint_path,
    checkpoint_step,
    finalize_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    read_index,
    remove_checkpoint,
    remove_partial_checkpoints,
)
from lrm_pl.checkpoints.network import averaged_names, load_network, network_tensors, require_network
from lrm_pl.checkpoints.owner import Owner, require_ownership
from lrm_pl.checkpoints.selection import choose_checkpoint, find_checkpoint, read_newest
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names, tensor_specs, write_tensors

__all__ = [
    "Checkpoint", "CheckpointError", "Mode", "MODE_SIGNS", "Owner", "require_ownership",
    "checkpoint_path", "checkpoint_step", "list_checkpoints", "newest_checkpoint", "read_checkpoint", "read_index",
    "choose_checkpoint", "find_checkpoint", "read_newest",
    "write_tensors", "finalize_checkpoint", "remove_checkpoint", "prune_checkpoints", "best_score",
    "remove_partial_checkpoints", "require_writable",
    "tensor_names", "tensor_specs", "read_tensors",
    "network_tensors", "averaged_names", "require_network", "load_network",
]  # fmt: skip
