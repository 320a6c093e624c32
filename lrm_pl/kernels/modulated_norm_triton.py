"""Triton kernels of ``modulated_norm``, which read each row once in the forward pass and once in the backward pass."""

import triton
import triton.language as tl


@triton.jit
def forward(x, weight, bias, out, mean, rstd, L, D, eps, BLOCK: tl.constexpr):
    """Normalize one row per program. Each object has L rows."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < D
    values = tl.load(x + row * D + c, mask=inside, other=0.0)
    average = tl.sum(values, 0) / D
    centered = tl.where(inside, values - average, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / D + eps)
    of_object = (row // L) * D + c
    w = tl.load(weight + of_object, mask=inside, other=0.0)
    b = tl.load(bias + of_object, mask=inside, other=0.0)
    tl.store(out + row * D + c, centered * scale * w + b, mask=inside)
    tl.store(mean + row, average)
    tl.store(rstd + row, scale)


@triton.jit
def backward(g, x, weight, mean, rstd, dx, dw, db, L, D, BLOCK: tl.constexpr):
    """Compute the gradients of rows p, p + P, ... of object b in program (p, b) of a grid (P, B).

    Partial sums of the gradients of the weight and bias are written to row p of ``dw[b]`` and ``db[b]``.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    of_object = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < D
    w = tl.load(weight + of_object * D + c, mask=inside, other=0.0)
    dw_sum = tl.zeros((BLOCK,), tl.float32)
    db_sum = tl.zeros((BLOCK,), tl.float32)
    for number in range(program, L, programs):
        row = of_object * L + number
        scale = tl.load(rstd + row)
        values = tl.load(x + row * D + c, mask=inside, other=0.0)
        incoming = tl.load(g + row * D + c, mask=inside, other=0.0)
        normalized = tl.where(inside, (values - tl.load(mean + row)) * scale, 0.0)
        weighted = incoming * w
        along = tl.sum(weighted * normalized, 0) / D
        tl.store(
            dx + row * D + c, (weighted - tl.sum(weighted, 0) / D - normalized * along) * scale, mask=inside
        )
        dw_sum += incoming * normalized
        db_sum += incoming
    sums = (of_object * programs + program) * D + c
    tl.store(dw + sums, dw_sum, mask=inside)
    tl.store(db + sums, db_sum, mask=inside)
