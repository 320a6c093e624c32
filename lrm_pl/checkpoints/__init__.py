"""A training checkpoint as files: written whole or not at all, checked before it is used, read without running code.

    CHECKPOINTS/step-00000650/
        .metadata, __0_0.distcp, ...   tensors by name, in shards, one file a rank (torch.distributed.checkpoint); or
        tensors.pt                     the same tensors in one file
        index.json                     written last: format version, run state, every file's size and sha256

A local folder is written as ``step-....partial`` and renamed when its index is in it; in an object store, where there
is no renaming, the index is what makes it complete. CHECKPOINTS is a local folder or a URL (``s3://``, ``gs://``).

``store`` writes and hashes files, ``owner`` keeps two runs apart, ``index`` is about whole checkpoints, ``choice``
about which of them a run goes on from, ``tensors`` about what is in them, ``network`` about the weights among that.
"""

from lrm_pl.checkpoints.choice import choose_checkpoint, find_checkpoint, read_newest
from lrm_pl.checkpoints.files import require_writable
from lrm_pl.checkpoints.index import (
    SIGNS,
    Checkpoint,
    CheckpointError,
    Format,
    Mode,
    best_score,
    checkpoint_path,
    complete,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    read_index,
    remove_checkpoint,
    remove_partial_files,
    step_of,
    tidy,
)
from lrm_pl.checkpoints.network import averaged_names, load_network, network_tensors, require_network
from lrm_pl.checkpoints.owner import Owner, require_own
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names, tensor_specs, write_tensors

__all__ = [
    "Checkpoint", "CheckpointError", "Format", "Mode", "SIGNS", "Owner", "require_own",
    "checkpoint_path", "step_of", "list_checkpoints", "newest_checkpoint", "read_checkpoint", "read_index",
    "choose_checkpoint", "find_checkpoint", "read_newest",
    "write_tensors", "complete", "remove_checkpoint", "tidy", "best_score", "remove_partial_files", "require_writable",
    "tensor_names", "tensor_specs", "read_tensors",
    "network_tensors", "averaged_names", "require_network", "load_network",
]  # fmt: skip
