"""A dispatch mode that counts the operations, memory and collectives of a program on fake tensors."""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation, or several identical ones.

    Attributes:
        part: Part of the program.
        name: Name of the operator.
        flops: Floating-point operations of matrix products and attention, 2 per multiply-add; 0 for others.
        accessed: Bytes read and written.
        count: Number of executions; ``flops`` and ``accessed`` are totals over all of them.
        scratch: Bytes of temporary buffers inside the operator, which stay in a cache and are not in ``accessed``.
    """

    part: str
    name: str
    flops: float
    accessed: float
    count: float = 1.0
    scratch: float = 0.0


class MemoryAccess(NamedTuple):
    """Bytes that an operator reads and writes, and bytes of its temporary buffers."""

    accessed: float
    scratch: float = 0.0


_BYTES_FORMULAS: dict[Any, Callable[..., MemoryAccess]] = {}


def register_bytes_formula(op: Any) -> Callable[[Callable[..., MemoryAccess]], Callable[..., MemoryAccess]]:  # noqa: ANN401
    """Register the decorated function as the memory access of an operator.

    The function takes the operator's arguments and ``out_val``. Operators without a formula are counted as reading each
    input and writing each output once.

    Args:
        op: The operator, such as ``torch.ops.lrm_pl.decode_along_rays``.
    """

    def register(formula: Callable[..., MemoryAccess]) -> Callable[..., MemoryAccess]:
        _BYTES_FORMULAS[op] = formula
        return formula

    return register


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of attention. PyTorch 2.14 registers formulas of the CUDA operators only."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    """Return the FLOPs of the recomputed q k^T and of the four products of the gradients."""
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        op: "all_gather", "reduce_scatter" or "all_reduce".
        size: Bytes of the full tensor.
        processes: Processes in the group.
    """

    op: str
    size: float
    processes: int

    @property
    def sent(self) -> float:
        """Bytes that a process sends in a ring algorithm: (n - 1) / n of the tensor, twice for an all-reduce."""
        return (2 if self.op == "all_reduce" else 1) * self.size * (self.processes - 1) / self.processes


_COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count every operation of the calling thread inside the context.

    Args:
        decomposed: Names of custom operators that are counted by the PyTorch operators of their implementation.

    Attributes:
        part: Current part of the program, recorded with each operation.
        allocated: Bytes of live tensors, without gradients.
        peak: Maximum of ``allocated``.
        gradients: Bytes of gradients of parameters, which some strategies hold all the time.
        peak_with_gradients: Maximum of the sum of both.
        operations: All operations.
        collectives: All collectives.
        work_fractions: Operator name -> fraction of its FLOPs that is executed (1 by default).
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
        """Return the FLOPs of one part, or of all parts."""
        return sum(x.flops for x in self.operations if part is None or x.part == part)

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed; a shared storage counts once."""
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
        self.peak = max(self.peak, self.allocated)
        self.peak_with_gradients = max(self.peak_with_gradients, self.allocated + self.gradients)

    def _drop(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key)

    @contextlib.contextmanager
    def repeated(self, times: float, threads: int = 1) -> Iterator[None]:
        """Count the operations inside as executed ``times`` times, by ``threads`` threads at once."""
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
        """Track resized storages: FSDP2 frees and reallocates gathered weights without an operation."""
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
        """Run an operation and count it."""
        kwargs = kwargs or {}
        if func._overloadpacket.__name__ in self.decomposed:
            with self:
                return _implementation(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self.track(tensor)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            self._count_collective(func, args, inputs)
        elif func.namespace != "prim" and not _is_view(func):  # prim reads devices and other properties
            self._count(func, args, kwargs, out, inputs, results)
        return out

    def _count(
        self,
        func: Any,  # noqa: ANN401 - an operator
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,  # noqa: ANN401
        inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:
        op, times = func._overloadpacket, self._times
        flop_formula, formula = flop_registry.get(op), _BYTES_FORMULAS.get(op)
        flops = 0.0 if flop_formula is None else float(flop_formula(*args, **kwargs, out_val=out))
        flops *= self.work_fractions.get(op.__name__, 1.0)
        if formula is None:
            access = MemoryAccess(_accessed(func, inputs, results))
        else:
            access = formula(*args, **kwargs, out_val=out)
        self.operations.append(
            Operation(self.part, op.__name__, times * flops, times * access.accessed, times, access.scratch)
        )
        self.peak = max(self.peak, self.allocated + access.scratch)
        self.peak_with_gradients = max(
            self.peak_with_gradients, self.allocated + self.gradients + access.scratch
        )

    def _count_collective(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:  # noqa: ANN401
        name = _COLLECTIVES.get(func._overloadpacket.__name__)
        if name is None:
            return
        group = next(
            ProcessGroup.unbox(x)
            for x in args
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x)
        )
        self.collectives.append(
            Collective(name, float(max(x.numel() * x.element_size() for x in tensors)), group.size())
        )


def _implementation(func: Any) -> Callable[..., Any]:  # noqa: ANN401 - an operator
    """Return the Python function of a custom operator."""
    # Private (torch 2.14.1): the function that custom_op decorated has no public accessor.
    definition = torch._library.custom_ops.OPDEFS[func._schema.name]
    function: Callable[..., Any] = definition._init_fn
    return function


def _is_view(func: Any) -> bool:  # noqa: ANN401 - an operator
    """Return whether an operator returns a view."""
    return func._overloadpacket.__name__ == "_unsafe_view" or any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    )


#: Operators that overwrite their first argument, that read as much of it as the result has, and that write as much of
#: it as their last tensor has.
_OVERWRITING = frozenset({"copy_", "fill_", "zero_"})
_GATHERING = frozenset({"index", "index_select", "gather", "embedding"})
_SCATTERING = frozenset({"index_put_", "_index_put_impl_"})


def _accessed(func: Any, inputs: list[Tensor], results: list[Tensor]) -> float:  # noqa: ANN401 - an operator
    """Return the bytes that an operator reads and writes: each input and result once, except as listed above."""
    name = func._overloadpacket.__name__
    if "empty" in name:
        tensors = []
    elif name.startswith("new_") or name.endswith("_like"):
        tensors = results  # of the other tensor only the shape is read
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
    """Return the bytes of a tensor's distinct elements; an expanded dimension counts once."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return tensor.element_size() * math.prod(
        size if stride or size == 0 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
