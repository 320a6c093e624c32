"""Dispatch mode that counts the operations, memory and collectives of a program that runs on fake tensors."""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lrm_pl.planning.kernel_bytes import BYTES_FORMULAS


@dataclasses.dataclass(frozen=True)
class Operation:
    """One or more executions of an operator.

    Attributes:
        part: Part of the program that executes the operator.
        name: Name of the operator.
        flops: Total number of floating-point operations. A multiply-add counts as 2, and operators without a formula
            for FLOPs count as 0.
        accessed: Total number of bytes read and written.
        count: Number of executions.
        scratch: Size in bytes of the temporary buffers inside the operator. The buffers remain in the cache of the GPU,
            so ``accessed`` does not include them.
    """

    part: str
    name: str
    flops: float
    accessed: float
    count: float = 1.0
    scratch: float = 0.0


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of the attention forward pass. PyTorch 2.14 registers formulas for the CUDA operators only."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    """Return the FLOPs of the attention backward pass, which recomputes q k^T and computes four more products."""
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        op: Type of the collective, which is "all_gather", "reduce_scatter" or "all_reduce".
        size: Size of the full tensor in bytes.
        processes: Number of processes in the group.
    """

    op: str
    size: float
    processes: int

    @property
    def sent(self) -> float:
        """Number of bytes that each process sends in a ring algorithm."""
        return (2 if self.op == "all_reduce" else 1) * self.size * (self.processes - 1) / self.processes


_COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that counts the operations that the calling thread executes inside the context.

    Args:
        decomposed: Names of custom operators for which the operators in the Python implementation are counted instead.

    Attributes:
        part: Current part of the program, which is recorded with each operation.
        allocated: Size in bytes of the live tensors, excluding gradients of parameters.
        peak: Maximum of ``allocated``.
        gradients: Size in bytes of the gradients of parameters.
        peak_with_gradients: Maximum of ``allocated + gradients``.
        operations: All operations.
        collectives: All collectives.
        work_fractions: Fraction of the FLOPs that are executed, for each operator name. The default is 1.
    """

    def __init__(self, decomposed: Container[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.decomposed = decomposed
        self.part = ""
        self.allocated = self.peak = self.gradients = self.peak_with_gradients = 0.0
        self.operations: list[Operation] = []
        self.collectives: list[Collective] = []
        self._sizes: dict[int, float] = {}
        self.work_fractions: dict[str, float] = {}
        self._times = 1.0

    def flops(self, part: str | None = None) -> float:
        """Return the FLOPs of one part of the program, or of all parts if ``part`` is None."""
        return sum(x.flops for x in self.operations if part is None or x.part == part)

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor as allocated until it is freed. A storage is counted only once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0.0
            weakref.finalize(storage, self._drop, key)
            self._resize(key, float(storage.nbytes()))

    def track_gradient(self, tensor: Tensor) -> None:
        """Move the storage of a tensor from ``allocated`` to ``gradients``."""
        key = tensor.untyped_storage()._cdata
        self.gradients += self._sizes[key]
        self._resize(key, 0.0)

    def _resize(self, key: int, size: float) -> None:
        self.allocated += size - self._sizes[key]
        self._sizes[key] = size
        self._update_peaks()

    def _drop(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key)

    @contextlib.contextmanager
    def repeated(self, times: float, threads: int = 1) -> Iterator[None]:
        """Count each operation inside the context as if it were executed several times.

        Args:
            times: Number of executions, which may be a fraction.
            threads: Number of threads that run concurrently and each allocate the memory of one execution.
        """
        before, peak, self._times = self.allocated, self.peak, times
        self.peak = before
        try:
            yield
        finally:
            most = before + threads * (self.peak - before)
            self.peak = max(peak, most)
            self.peak_with_gradients = max(self.peak_with_gradients, most + self.gradients)
            self._times = 1.0

    @contextlib.contextmanager
    def track_resizes(self) -> Iterator[None]:
        """Track resized storages, because FSDP2 frees and reallocates gathered weights without calling an operator."""
        original: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # noqa: ANN401 - torch's signature
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, float(size))
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operator and record its operations and memory."""
        op, kwargs = func._overloadpacket, kwargs or {}
        if op.__name__ in self.decomposed:
            with self:
                return _implementation(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        inputs, results = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out)
        )
        for tensor in results:
            self.track(tensor)
        if op.__name__ in _COLLECTIVES:
            group = next(
                ProcessGroup.unbox(x)
                for x in args
                if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x)
            )
            size = float(max(x.numel() * x.element_size() for x in inputs))
            self.collectives.append(Collective(_COLLECTIVES[op.__name__], size, group.size()))
        # Operators in prim only read properties.
        elif func.namespace not in ("c10d", "prim") and not _is_view(func):
            flop_formula, formula = flop_registry.get(op), BYTES_FORMULAS.get(op)
            flops = 0.0 if flop_formula is None else float(flop_formula(*args, **kwargs, out_val=out))
            flops *= self._times * self.work_fractions.get(op.__name__, 1.0)
            accessed, scratch = (
                formula(*args, **kwargs, out_val=out) if formula else (_accessed(func, inputs, results), 0.0)
            )
            self.operations.append(
                Operation(self.part, op.__name__, flops, self._times * accessed, self._times, scratch)
            )
            self._update_peaks(scratch)
        return out

    def _update_peaks(self, scratch: float = 0.0) -> None:
        self.peak = max(self.peak, self.allocated + scratch)
        self.peak_with_gradients = max(self.peak_with_gradients, self.allocated + self.gradients + scratch)


def _implementation(func: Any) -> Callable[..., Any]:  # noqa: ANN401 - an operator
    """Return the Python function that implements a custom operator."""
    # This API is private (torch 2.14.1), but there is no public access to the function that custom_op decorated.
    function: Callable[..., Any] = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
    return function


def _is_view(func: Any) -> bool:  # noqa: ANN401 - an operator
    """Return whether an operator returns a view."""
    return func._overloadpacket.__name__ == "_unsafe_view" or any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    )


#: Operators that overwrite the first argument, operators that read as many bytes of the first argument as the result
#: has, and operators that write as many bytes of the first argument as the last argument has.
_OVERWRITING = frozenset({"copy_", "fill_", "zero_"})
_GATHERING = frozenset({"index", "index_select", "gather", "embedding"})
_SCATTERING = frozenset({"index_put_", "_index_put_impl_"})


def _accessed(func: Any, inputs: list[Tensor], results: list[Tensor]) -> float:  # noqa: ANN401 - an operator
    """Return the number of bytes that an operator reads and writes.

    Each input and each result is counted once, except for operators that only create tensors and for operators in
    ``_OVERWRITING``, ``_GATHERING`` and ``_SCATTERING``.
    """
    name = func._overloadpacket.__name__
    if "empty" in name:
        tensors = []
    elif name.startswith("new_") or name.endswith("_like"):
        tensors = results  # the operator uses only the shape of the input
    elif name in _OVERWRITING:
        tensors = [*inputs[1:], *results]
    elif name in _GATHERING:
        tensors = [*inputs[1:], *results, *results]
    elif name in _SCATTERING:
        tensors = [*inputs[1:], inputs[-1]]
    else:
        tensors = [*inputs, *results]
    return float(sum(_size(x) for x in tensors))


def _size(tensor: Tensor) -> int:
    """Return the size in bytes of a tensor's distinct elements. An expanded dimension counts as having size 1."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return tensor.element_size() * math.prod(
        size if stride or size == 0 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
