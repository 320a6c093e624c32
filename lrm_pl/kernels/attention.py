"""Memory-efficient attention on a CPU, computed block by block (Rabe and Staats 2021; FlashAttention, Dao et al. 2022).

The operation computes softmax(q k^T / sqrt d) v for ``q`` (B, h, L, d), and ``k`` and ``v`` (B, h, N, d) of the same
dtype. It is differentiable with respect to all three tensors. Each thread holds the scores of only one block of queries
at a time, and the backward pass recomputes the scores. By comparison, the full scores of 3072 tokens and 8 heads take
150 MB per layer in bf16. The reference implementation is ``attention_plain``.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lrm_pl.kernels.device import on_cpu
from lrm_pl.kernels.threads import run_threads

#: Number of scores per block. A block and the tensors derived from it fit in the L2 cache of a core.
_SCORES = 768 * 1024


def attention_plain(
    q: Float[Tensor, "B h L d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
) -> Float[Tensor, "B h L d"]:
    """Compute attention with one matrix of scores per head.

    This is the reference implementation, which is also used for small inputs.
    """
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v


def attention_in_blocks(
    q: Float[Tensor, "B h L d"], k: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"]
) -> Float[Tensor, "B h L d"]:
    """Compute attention block by block (see the module docstring).

    Raises:
        ValueError: The tensors are not on the CPU or have different dtypes.
    """
    if not on_cpu(q) or not q.dtype == k.dtype == v.dtype:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"expected q, k and v of the same dtype on the CPU, but found {found}")
    return torch.ops.lrm_pl.attention_in_blocks(q, k, v)


@torch.library.custom_op("lrm_pl::attention_in_blocks", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = _empty_heads_last(q)

    def head(b: int, h: int) -> None:
        queries, keys, values = q[b, h] * q.shape[-1] ** -0.5, k[b, h].t(), v[b, h].contiguous()
        for rows in _blocks(q.shape[2], k.shape[2]):
            out[b, h, rows] = torch.softmax(queries[rows] @ keys, dim=-1) @ values

    _for_each_head(q, head)
    return out


@torch.library.custom_op("lrm_pl::attention_in_blocks_backward", mutates_args=())
def _backward_op(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)

    def head(b: int, h: int) -> None:
        scale = q.shape[-1] ** -0.5
        queries, keys, values = q[b, h] * scale, k[b, h].contiguous(), v[b, h].contiguous()
        # Sums over blocks of queries are accumulated in float32.
        keys_sum, values_sum = (torch.zeros(x.shape, dtype=torch.float32) for x in (keys, values))
        blocks = _blocks(q.shape[2], k.shape[2])
        # Two buffers are reused for all blocks to avoid page faults.
        size = max(rows.stop - rows.start for rows in blocks)
        buffers = q.new_empty(2, size, k.shape[2])
        for rows in blocks:
            block, incoming = queries[rows], grad[b, h, rows]
            scores, other = buffers[:, : rows.stop - rows.start]
            torch.mm(block, keys.t(), out=scores)
            weights = torch.softmax(scores, dim=-1, out=scores)
            values_sum += weights.t() @ incoming
            torch.mm(incoming, values.t(), out=other)
            scores_grad = torch.ops.aten._softmax_backward_data(other, weights, -1, weights.dtype)
            q_grad[b, h, rows] = (scores_grad @ keys) * scale
            keys_sum += scores_grad.t() @ block
        k_grad[b, h], v_grad[b, h] = keys_sum, values_sum

    _for_each_head(q, head)
    return q_grad, k_grad, v_grad


def _empty_heads_last(x: Tensor) -> Tensor:
    """Return an empty tensor (B, h, L, d) with the memory layout (B, L, h, d) that the output projection expects."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _blocks(queries: int, keys: int) -> list[slice]:
    """Split the queries into blocks of equal size, except for the last block, which may be smaller."""
    count = math.ceil(queries * keys / _SCORES)
    size = math.ceil(queries / count)
    return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]


def _for_each_head(q: Tensor, work: Callable[[int, int], None]) -> None:
    """Call ``work(b, h)`` for every head of every object, and distribute the heads over threads."""
    heads = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    threads = min(torch.get_num_threads(), len(heads))

    def run(thread: int) -> None:
        for b, h in heads[thread::threads]:
            work(b, h)

    run_threads(threads, run)


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _empty_heads_last(q)


@_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads_last(q), _empty_heads_last(k), _empty_heads_last(v)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.lrm_pl.attention_in_blocks_backward(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]


_op.register_autograd(_backward, setup_context=_setup_context)


# FLOPs of the custom operators. The backward pass recomputes the scores.
@register_flop_formula(torch.ops.lrm_pl.attention_in_blocks)
def _(q: torch.Size, k: torch.Size, v: torch.Size, **_: object) -> int:
    return 2 * _products(q, k)


@register_flop_formula(torch.ops.lrm_pl.attention_in_blocks_backward)
def _(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, **_: object) -> int:
    return 5 * _products(q, k)


def _products(q: torch.Size, k: torch.Size) -> int:
    """Return the number of FLOPs of one matrix product between queries and keys, 2 * B * h * L * N * d."""
    return 2 * q.numel() * k[2]
