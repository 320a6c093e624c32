"""Fake tensors on a CUDA device, for which operators check devices, dtypes and shapes without computing."""

import copy
import warnings

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda", 0)


class AllTrue(TorchDispatchMode):
    """Define data-dependent results. A mask selects all elements, and a value that is copied to the host is 0.5."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        aten, keywords = torch.ops.aten, keywords or {}
        if function is aten.nonzero.default:
            return self._everywhere(arguments[0])
        if function is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(arguments[0].dtype, 0.5)
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            tensor, indices, *rest = arguments
            picked = []
            for index in indices:
                masks = index is not None and index.dtype in (torch.bool, torch.uint8)
                picked += self._everywhere(index).unbind(1) if masks else [index]
            arguments = (tensor, picked, *rest)
        return function(*arguments, **keywords)

    def _everywhere(self, mask):
        return mask.new_empty((mask.numel(), mask.ndim), dtype=torch.int64)


class FakeCuda:
    """Context for operators on fake tensors on ``DEVICE``. Real tensors are not supported."""

    def __init__(self):
        self._modes = FakeTensorMode(), AllTrue()

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        # Warnings of torch.autocast on a machine without a GPU.
        for message in (
            "User provided device_type of 'cuda', but CUDA is not available",
            "CUDA is not available or",
        ):
            warnings.filterwarnings("ignore", message)
        return self

    def __exit__(self, *error):
        self._caught.__exit__(*error)
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def module(self, module):
        """Return a copy of a module on the device."""
        copies = {}
        for tensor in (*module.parameters(), *module.buffers()):
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
            copies[id(tensor)] = (
                nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            )
        return copy.deepcopy(module, copies)

    def on_the_host(self, tree):
        """Return a tree with fake copies of its tensors on the host."""
        return tree_map_only(torch.Tensor, self._modes[0].from_tensor, tree)


def devices(value):
    """Return the devices of all tensors in a dataclass or tree."""
    found = set()

    def look(one):
        if isinstance(one, torch.Tensor):
            found.add(one.device)
        elif isinstance(one, dict):
            look(tuple(one.values()))
        elif isinstance(one, (tuple, list)):
            for part in one:
                look(part)
        elif hasattr(one, "__dataclass_fields__"):
            look(vars(one))

    look(value)
    return found
