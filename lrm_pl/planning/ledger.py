"""An account of a program as it runs on fake tensors: memory held, operations, bytes sent to other processes."""

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
    """One operation, or several alike.

    Attributes:
        part: Which part of the program it belongs to.
        name: The operator's.
        flops: Floating-point operations of its products, 2 a multiplication and addition; 0 for everything else.
        moved: Bytes of memory that it reads and writes.
        count: How often it runs; flops and bytes are of all of them together.
        scratch: Bytes of private buffers that it holds while it runs, whose traffic stays in a cache; not in ``moved``.
    """

    part: str
    name: str
    flops: float
    moved: float
    count: float = 1.0
    scratch: float = 0.0


class Traffic(NamedTuple):
    """Bytes of memory that an operator reads and writes, and of private buffers that it holds while it runs."""

    moved: float
    scratch: float = 0.0


_TRAFFIC: dict[Any, Callable[..., Traffic]] = {}


def register_bytes_formula(op: Any) -> Callable[[Callable[..., Traffic]], Callable[..., Traffic]]:  # noqa: ANN401
    """Decorate a function of an operator's arguments and ``out_val`` that returns its traffic.

    For custom operators that do not move each input and output once: bytes of other operators follow from their
    tensors.

    Args:
        op: The operator, such as ``torch.ops.lrm_pl.decode_along_rays``.
    """

    def register(formula: Callable[..., Traffic]) -> Callable[..., Traffic]:
        _TRAFFIC[op] = formula
        return formula

    return register


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """Return the FLOPs of q k^T and of its product with v. PyTorch 2.14 registers CUDA's operators only."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object
) -> int:
    """Return the FLOPs of q k^T again and of the four gradients' products: three of q's width, two of v's."""
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


@dataclasses.dataclass(frozen=True)
class Message:
    """One exchange among processes.

    Attributes:
        kind: "gather", "scatter" (its sum) or "reduce" (a sum that all get).
        size: Bytes of the whole tensor.
        processes: How many take part.
    """

    kind: str
    size: float
    processes: int

    @property
    def sent(self) -> float:
        """Bytes that a process sends, in a ring: (n - 1) / n of the whole, twice for a sum that all get."""
        return (2 if self.kind == "reduce" else 1) * self.size * (self.processes - 1) / self.processes


_MESSAGES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce"}


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watch every operation of the calling thread while it is entered.

    Args:
        opened: Names of custom operators in whose place the operations of their bodies are booked. Fake tensors run
            bodies made of PyTorch's operators only.

    Attributes:
        part: What operations are booked under.
        held: Bytes that live tensors hold now, but for what was set aside.
        peak: The most that they held.
        aside: Bytes set aside: gradients of parameters, which some strategies hold all the time.
        peak_with_aside: The most that both held together.
        operations: What ran.
        messages: What was exchanged.
        shares: Name of an operator -> the share of its FLOPs that is done; 1 where there is none.
    """

    def __init__(self, opened: Container[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.opened = opened
        self.part = ""
        self.held = self.peak = self.aside = self.peak_with_aside = 0.0
        self.operations: list[Operation] = []
        self.messages: list[Message] = []
        self._sizes: dict[int, float] = {}
        self.shares: dict[str, float] = {}
        self._times = 1.0

    def flops(self, part: str | None = None) -> float:
        """Add up the operations of a part, or of all."""
        return sum(x.flops for x in self.operations if part is None or x.part == part)

    def moved(self, part: str | None = None) -> float:
        """Add up the bytes that a part, or all, reads and writes."""
        return sum(x.moved for x in self.operations if part is None or x.part == part)

    def hold(self, tensor: Tensor) -> None:
        """Book the memory of a tensor until it is gone; once for all tensors that share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0.0
            weakref.finalize(storage, self._drop, key)
            self._resize(key, float(storage.nbytes()))

    def set_aside(self, tensor: Tensor) -> None:
        """Book the memory of a tensor apart from now on."""
        key = tensor.untyped_storage()._cdata
        self.aside += self._sizes[key]
        self._resize(key, 0.0)

    def _resize(self, key: int, size: float) -> None:
        self.held += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.held)
        self.peak_with_aside = max(self.peak_with_aside, self.held + self.aside)

    def _drop(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    @contextlib.contextmanager
    def repeated(self, times: float, threads: int = 1) -> Iterator[None]:
        """Book what is done inside as if it were done so many times, by so many threads at once."""
        before, peak, self._times = self.held, self.peak, times
        self.peak = before
        try:
            yield
        finally:
            most = before + threads * (self.peak - before)
            self.peak = max(peak, most)
            self.peak_with_aside = max(self.peak_with_aside, most + self.aside)
            self._times = 1.0

    @contextlib.contextmanager
    def seeing_resizes(self) -> Iterator[None]:
        """See storages that are emptied and filled again without an operation, as FSDP2 does with gathered weights."""
        original: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:  # noqa: ANN401 - as torch has it
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
        """Run an operation and book it."""
        kwargs = kwargs or {}
        if func._overloadpacket.__name__ in self.opened:
            with self:
                return _body(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self.hold(tensor)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            self._exchange(func, args, inputs)
        elif func.namespace != "prim" and not _is_view(func):  # prim looks up devices and the like
            self._book(func, args, kwargs, out, inputs, results)
        return out

    def _book(
        self,
        func: Any,  # noqa: ANN401 - an operator
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,  # noqa: ANN401
        inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:
        op, times = func._overloadpacket, self._times
        count, formula = flop_registry.get(op), _TRAFFIC.get(op)
        flops = 0.0 if count is None else float(count(*args, **kwargs, out_val=out))
        flops *= self.shares.get(op.__name__, 1.0)
        if formula is None:
            traffic = Traffic(_moved(func, inputs, results))
        else:
            traffic = formula(*args, **kwargs, out_val=out)
        self.operations.append(
            Operation(self.part, op.__name__, times * flops, times * traffic.moved, times, traffic.scratch)
        )
        self.peak = max(self.peak, self.held + traffic.scratch)
        self.peak_with_aside = max(self.peak_with_aside, self.held + self.aside + traffic.scratch)

    def _exchange(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:  # noqa: ANN401
        kind = _MESSAGES.get(func._overloadpacket.__name__)
        if kind is None:
            return
        group = next(
            ProcessGroup.unbox(x)
            for x in args
            if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x)
        )
        self.messages.append(
            Message(kind, float(max(x.numel() * x.element_size() for x in tensors)), group.size())
        )


def _body(func: Any) -> Callable[..., Any]:  # noqa: ANN401 - an operator
    """Return the body of a custom operator."""
    # Private (torch 2.14.1): there is no public way from an operator to the function that custom_op decorated.
    definition = torch._library.custom_ops.OPDEFS[func._schema.name]
    body: Callable[..., Any] = definition._init_fn
    return body


def _is_view(func: Any) -> bool:  # noqa: ANN401 - an operator
    """Return whether an operator only looks at memory in another way."""
    return func._overloadpacket.__name__ == "_unsafe_view" or any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    )


#: Operators that overwrite their first argument; that read a part of it as large as the result; that write a part of
#: it as large as their last tensor.
_OVERWRITING = frozenset({"copy_", "fill_", "zero_"})
_GATHERING = frozenset({"index", "index_select", "gather", "embedding"})
_SCATTERING = frozenset({"index_put_", "_index_put_impl_"})


def _moved(func: Any, inputs: list[Tensor], results: list[Tensor]) -> float:  # noqa: ANN401 - an operator
    """Return the bytes that an operator reads and writes: each input and result once, but for those named above."""
    name = func._overloadpacket.__name__
    if "empty" in name:
        touched = []
    elif name.startswith("new_") or name.endswith("_like"):
        touched = results  # of the other tensor only the pattern is read
    elif name in _OVERWRITING:
        touched = [*inputs[1:], *results]
    elif name in _GATHERING:
        touched = [*inputs[1:], *results, *results]
    elif name in _SCATTERING:
        touched = [*inputs[1:], inputs[-1]]
    else:
        touched = [*inputs, *results]
    return float(sum(_size(x) for x in touched))


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct numbers: those of an expanded dimension are one."""
    if tensor.layout != torch.strided:
        return tensor.numel() * tensor.element_size()
    return tensor.element_size() * math.prod(
        size if stride or size == 0 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
