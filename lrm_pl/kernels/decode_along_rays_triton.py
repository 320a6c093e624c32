"""Triton kernels of ``decode_along_rays`` for the forward and backward pass of triplane sampling and the MLP.

One launch processes one object. A tile contains TH x TW pixels with TK samples each. It is compact in space, so that it
covers about one window of 8 x 8 texels per plane. Programs are persistent. Program i of P programs processes the tiles
i, i + P, i + 2 P, ..., so the order of its private sums is fixed. In the backward pass, a program recomputes the
pre-activations of a tile into a private scratch buffer that stays in the L2 cache. Weight gradients are accumulated in
private buffers. Plane gradients are summed over the tile by a matrix product with the bilinear weights, and then added
with one atomic operation per element of each window.

The loop over layers must not be unrolled because Triton would then hoist the weights of all layers into registers,
which would cause spilling.
"""

import triton
import triton.language as tl


@triton.jit
def _axis(px, py, pz, AXIS: tl.constexpr):
    """Return one of three coordinates, selected by the index of the axis."""
    if AXIS == 0:
        return px
    elif AXIS == 1:
        return py
    else:
        return pz


@triton.jit
def _texel(position, S: tl.constexpr):
    """Convert positions in [-1, 1] to texel coordinates, clamped to a range outside of which all weights are 0."""
    return tl.minimum(tl.maximum(0.5 * ((position + 1.0) * S - 1.0), -2.0), S + 1.0)


@triton.jit
def _gather(plane, u, v, S: tl.constexpr, C: tl.constexpr):
    """Sample one plane (S, S, C) bilinearly at columns u and rows v, with zero padding."""
    c = tl.arange(0, C)
    x, y = _texel(u, S), _texel(v, S)
    x_low, y_low = tl.floor(x), tl.floor(y)
    fx, fy = x - x_low, y - y_low
    out = tl.zeros((u.shape[0], C), tl.float32)
    for corner in tl.static_range(4):
        xi = x_low.to(tl.int32) + (corner % 2)
        yi = y_low.to(tl.int32) + (corner // 2)
        weight = (fx if corner % 2 else 1.0 - fx) * (fy if corner // 2 else 1.0 - fy)
        inside = (xi >= 0) & (xi < S) & (yi >= 0) & (yi < S)
        # Without this hint, the select loses the alignment, and loads are only 2 bytes wide.
        at = tl.multiple_of(tl.where(inside, yi * S + xi, 0) * C, 16)
        texels = tl.load(plane + at[:, None] + c[None, :]).to(tl.float32)
        out += tl.where(inside, weight, 0.0)[:, None] * texels
    return out


@triton.jit
def _dot(a, b, sums, HALF: tl.constexpr):
    """Multiply matrices in bfloat16 or float32, and add the product to float32 accumulators."""
    if HALF:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _activation(z, SILU: tl.constexpr):
    return z * tl.sigmoid(z) if SILU else tl.maximum(z, 0.0)


@triton.jit
def _derivative(z, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    else:
        return tl.where(z > 0.0, 1.0, 0.0)


@triton.jit
def _tile(
    tile, origins, directions, t, alive, N, W, K,
    TH: tl.constexpr, TW: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """Return the sample indices of a tile, masks of the samples in bounds and of those to evaluate, and positions."""
    m = tl.arange(0, TH * TW * TK)
    slabs, across = tl.cdiv(K, TK), tl.cdiv(W, TW)
    k = (tile % slabs) * TK + m % TK
    pixel, patch = m // TK, tile // slabs
    column = (patch % across) * TW + pixel % TW
    row = (patch // across) * TH + pixel // TW
    exists = (k < K) & (column < W) & (row < N)
    ray = tl.where(exists, row * W + column, 0)
    n = ray * K + tl.where(exists, k, 0)
    hit = exists & (tl.load(alive + ray) != 0)
    # The distances are loaded as a column because the layout of a vectorized load would make the layers spill.
    distance = tl.sum(tl.load(t + n[:, None] + tl.arange(0, 1)[None, :]), 1)
    px = tl.load(origins + ray * 3) + distance * tl.load(directions + ray * 3)
    py = tl.load(origins + ray * 3 + 1) + distance * tl.load(directions + ray * 3 + 1)
    pz = tl.load(origins + ray * 3 + 2) + distance * tl.load(directions + ray * 3 + 2)
    return n, exists, hit, px, py, pz


@triton.jit
def _features(planes, px, py, pz, S: tl.constexpr, C: tl.constexpr, AXES: tl.constexpr):
    """Sum the features of the three planes."""
    x = _gather(planes, _axis(px, py, pz, AXES[0]), _axis(px, py, pz, AXES[1]), S, C)
    x += _gather(planes + S * S * C, _axis(px, py, pz, AXES[2]), _axis(px, py, pz, AXES[3]), S, C)
    x += _gather(planes + 2 * S * S * C, _axis(px, py, pz, AXES[4]), _axis(px, py, pz, AXES[5]), S, C)
    return x


@triton.jit
def forward(
    planes, origins, directions, t, alive, weights, biases, out, tiles, N, W, K,
    S: tl.constexpr, C: tl.constexpr, L: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TK: tl.constexpr,
    AXES: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr, EMPTY_RAW_DENSITY: tl.constexpr,
):  # fmt: skip
    """Write raw densities and color logits to ``out`` (N, W, K, 4).

    For samples on rays that are not alive, EMPTY_RAW_DENSITY and zeros are written.
    """
    M: tl.constexpr = TH * TW * TK
    c, four = tl.arange(0, C), tl.arange(0, 16)
    square = c[:, None] * C + c[None, :]
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        n, exists, hit, px, py, pz = _tile(tile, origins, directions, t, alive, N, W, K, TH, TW, TK)
        at, mask = out + n[:, None] * 4 + four[None, :], exists[:, None] & (four[None, :] < 4)
        dead = tl.where(four == 0, EMPTY_RAW_DENSITY, 0.0)
        if tl.max(hit.to(tl.int32), 0) > 0:
            x = _features(planes, px, py, pz, S, C, AXES) + tl.load(biases + c)[None, :]
            x = _activation(x, SILU)
            for layer in range(L):
                w = tl.load(weights + layer * C * C + square)
                z = _dot(x, w, tl.zeros((M, C), tl.float32), HALF)
                x = _activation(z + tl.load(biases + (layer + 1) * C + c)[None, :], SILU)
            last = tl.load(weights + L * C * C + c[:, None] * 16 + four[None, :])
            y = _dot(x, last, tl.zeros((M, 16), tl.float32), HALF)
            y += tl.load(biases + (L + 1) * C + four)[None, :]
            tl.store(at, tl.where(hit[:, None], y, dead[None, :]), mask=mask)
        else:
            tl.store(at, tl.zeros((M, 16), tl.float32) + dead[None, :], mask=mask)


@triton.jit
def _scatter(
    grad, g, u, v, hit, S: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Add the gradient of ``_gather`` with respect to the plane to ``grad``.

    A matrix product sums the gradient over the tile. Each element of a window is added with one atomic operation.
    """
    c, k = tl.arange(0, C), tl.arange(0, WINDOW * WINDOW)
    x, y = _texel(u, S), _texel(v, S)
    x_low = tl.maximum(tl.floor(tl.min(tl.where(hit, x, S + 1.0), 0)).to(tl.int32), 0)
    y_low = tl.maximum(tl.floor(tl.min(tl.where(hit, y, S + 1.0), 0)).to(tl.int32), 0)
    x_high = tl.minimum(tl.floor(tl.max(tl.where(hit, x, -2.0), 0)).to(tl.int32) + 1, S - 1)
    y_high = tl.minimum(tl.floor(tl.max(tl.where(hit, y, -2.0), 0)).to(tl.int32) + 1, S - 1)
    for j in range(y_low, y_high + 1, WINDOW):
        for i in range(x_low, x_high + 1, WINDOW):
            column, row = i + k % WINDOW, j + k // WINDOW
            tent = tl.maximum(0.0, 1.0 - tl.abs(x[None, :] - column[:, None].to(tl.float32)))
            tent *= tl.maximum(0.0, 1.0 - tl.abs(y[None, :] - row[:, None].to(tl.float32)))
            total = _dot(tent, g, tl.zeros((WINDOW * WINDOW, C), tl.float32), HALF)
            inside = (column < S) & (row < S)
            tl.atomic_add(
                grad + ((row * S + column) * C)[:, None] + c[None, :],
                total,
                mask=inside[:, None] & (c[None, :] < C),
                sem="relaxed",
            )


@triton.jit
def backward(
    planes, planes_grad, origins, directions, t, alive, weights, biases, g, dw, db, scratch, tiles, N, W, K,
    S: tl.constexpr, C: tl.constexpr, L: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TK: tl.constexpr,
    AXES: tl.constexpr, SILU: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Add gradients to ``planes_grad``, and to the rows of ``dw`` and ``db`` that belong to this program."""
    M: tl.constexpr = TH * TW * TK
    SIZE: tl.constexpr = S * S * C
    c, four, m = tl.arange(0, C), tl.arange(0, 16), tl.arange(0, M)
    square, here = c[:, None] * C + c[None, :], m[:, None] * C + c[None, :]
    program = tl.program_id(0)
    dw += program * (L * C * C + C * 16)
    db += program * ((L + 1) * C + 16)
    scratch += program * ((L + 1) * M * C)
    for tile in range(program, tiles, tl.num_programs(0)):
        n, _, hit, px, py, pz = _tile(tile, origins, directions, t, alive, N, W, K, TH, TW, TK)
        if tl.max(hit.to(tl.int32), 0) > 0:
            z = (_features(planes, px, py, pz, S, C, AXES) + tl.load(biases + c)[None, :]).to(
                scratch.dtype.element_ty
            )
            tl.store(scratch + here, z)
            for layer in range(L):
                w = tl.load(weights + layer * C * C + square)
                s = _dot(_activation(z.to(tl.float32), SILU), w, tl.zeros((M, C), tl.float32), HALF)
                z = (s + tl.load(biases + (layer + 1) * C + c)[None, :]).to(scratch.dtype.element_ty)
                tl.store(scratch + (layer + 1) * M * C + here, z)
            tl.debug_barrier()  # wait for the stores of all threads
            y = tl.load(
                g + n[:, None] * 4 + four[None, :], mask=hit[:, None] & (four[None, :] < 4), other=0.0
            )
            last = tl.load(weights + L * C * C + c[:, None] * 16 + four[None, :])
            at = dw + L * C * C + c[:, None] * 16 + four[None, :]
            tl.store(at, _dot(tl.trans(_activation(z.to(tl.float32), SILU)), y, tl.load(at), HALF))
            end = db + (L + 1) * C + four
            tl.store(end, tl.load(end) + tl.sum(y, 0))
            dx = _dot(y, tl.trans(last), tl.zeros((M, C), tl.float32), HALF)
            dz = dx * _derivative(z.to(tl.float32), SILU)
            for layer in range(L - 1, -1, -1):
                before = tl.load(scratch + layer * M * C + here).to(tl.float32)
                back = tl.load(weights + layer * C * C + square)
                spot = dw + layer * C * C + square
                tl.store(spot, _dot(tl.trans(_activation(before, SILU)), dz, tl.load(spot), HALF))
                side = db + (layer + 1) * C + c
                tl.store(side, tl.load(side) + tl.sum(dz, 0))
                dz = _dot(dz, tl.trans(back), tl.zeros((M, C), tl.float32), HALF) * _derivative(before, SILU)
            # The points are recomputed because keeping them across the layers would spill registers.
            n, _, hit, px, py, pz = _tile(tile, origins, directions, t, alive, N, W, K, TH, TW, TK)
            first = db + c
            tl.store(first, tl.load(first) + tl.sum(dz, 0))
            _scatter(
                planes_grad,
                dz,
                _axis(px, py, pz, AXES[0]),
                _axis(px, py, pz, AXES[1]),
                hit,
                S,
                C,
                WINDOW,
                HALF,
            )
            _scatter(
                planes_grad + SIZE, dz, _axis(px, py, pz, AXES[2]), _axis(px, py, pz, AXES[3]), hit, S, C, WINDOW,
                HALF,
            )  # fmt: skip
            _scatter(
                planes_grad + 2 * SIZE, dz, _axis(px, py, pz, AXES[4]), _axis(px, py, pz, AXES[5]), hit, S, C,
                WINDOW, HALF,
            )  # fmt: skip
            # The next tile overwrites the scratch buffer and reads sums that other threads have stored.
            tl.debug_barrier()
