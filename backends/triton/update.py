"""The integer update of `ternarize.backends.torch.update` in two kernels, equal to it bit for bit where G is exact.

`stage_kernel` holds a tile of G = grad_yᵀ · x in registers and turns it into integers there: no float [N, K] exists.
`commit_kernel` steps and packs the trits. Both are launched without fused multiply-add: a floor follows, and a CPU and
a GPU have to agree about it. `update_tma` has the first for Hopper, `update_vectors` what is [N], [K] or [N, G] sized.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton import update_tma
from ternarize.backends.triton.packed import (
    INTERPRETED,
    columns,
    decode,
    load_codes,
    tiling,
)
from ternarize.backends.triton.rounding import add_uniform, floor, floor_to_int, random_bits, to_int, words_together
from ternarize.backends.triton.update_vectors import commit_vectors, finish_stage, normalisers
from ternarize.packing import ROW, groups_per_row
from ternarize.philox import ACCUMULATOR_STREAM, GRADIENT_STREAM, MOMENTUM_STREAM

_CLIP = tl.constexpr(reference.CLIP)
_NONFINITE_GRADIENT = tl.constexpr(reference.NONFINITE_GRADIENT)
_GRADIENT_STREAM = tl.constexpr(GRADIENT_STREAM)
_MOMENTUM_STREAM = tl.constexpr(MOMENTUM_STREAM)
_ACCUMULATOR_STREAM = tl.constexpr(ACCUMULATOR_STREAM)
_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def clamp(value: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """Value within -limit and limit."""
    return tl.minimum(tl.maximum(value, -limit), limit)


@triton.jit
def stage_kernel(
    grad_y: tl.tensor,
    x: tl.tensor,
    T_packed: tl.tensor,
    row_factor: tl.tensor,
    col_factor: tl.tensor,
    rng: tl.tensor,
    stage: tl.tensor,
    stage_E: tl.tensor,
    slope: tl.tensor,
    row_parts: tl.tensor,
    col_parts: tl.tensor,
    status: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    chunks: tl.tensor,
    tiles: tl.tensor,
    stride_gm: tl.tensor,
    stride_gn: tl.tensor,
    stride_xm: tl.tensor,
    stride_xk: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WORDS_TOGETHER: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """One tile of the stage, [BLOCK_N, 4 * BLOCK_C].

    The rule is `factored` where row_factor is given: sums of squares of the tile then go to its row of ``row_parts``,
    float32 [tiles, N], and of ``col_parts``, [tiles of rows, K]. Where stage_E is, exponents are voted on: at once if
    the tile holds the whole group, else the tile writes its part to ``slope``, float32 [N, tiles].
    """
    tile_n, tile_k = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    group, byte, byte_inside, k, k_inside = columns(tile_k, K, group_size, chunks, BLOCK_C)
    inside = (n < N)[:, None] & k_inside[None, :]
    G = tl.zeros((BLOCK_N, 4 * BLOCK_C), tl.float32)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        m_row = m.to(tl.int64)
        g = tl.load(
            grad_y + m_row[None, :] * stride_gm + n.to(tl.int64)[:, None] * stride_gn,
            mask=(n < N)[:, None] & (m < M)[None, :],
            other=0.0,
        )
        a = tl.load(
            x + m_row[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk,
            mask=(m < M)[:, None] & k_inside[None, :],
            other=0.0,
        )
        if UPCAST:
            g, a = g.to(tl.float32), a.to(tl.float32)
        G = tl.dot(g, a, G, input_precision="ieee")

    # Comparisons with NaN are false.
    finite = tl.abs(G) <= _FLOAT32_MAX
    broken = tl.max(tl.max((inside & (finite == 0)).to(tl.int32), 1), 0)
    tl.atomic_or(status, _NONFINITE_GRADIENT, mask=broken > 0)
    G = tl.where(finite, G, 0.0)

    if row_factor is not None:
        rows = tl.load(row_factor + n, mask=n < N, other=0.0)
        cols = tl.load(col_factor + k, mask=k_inside, other=0.0)
        bits = random_bits(rng, tl.load(status + 1) + _GRADIENT_STREAM, n, k, K, WORDS_TOGETHER)
        u = floor_to_int(clamp(add_uniform(G * rows[:, None] * cols[None, :], bits), _CLIP))
        square = G * G
        tl.store(row_parts + tile_k.to(tl.int64) * N + n, tl.sum(square, 1), mask=n < N)
        tl.store(col_parts + tile_n.to(tl.int64) * K + k, tl.sum(square, 0), mask=k_inside)
    else:
        u = (G > 0).to(tl.int32) - (G < 0).to(tl.int32)
    place = stage + n.to(tl.int64)[:, None] * K + k[None, :]
    staged = tl.load(place, mask=inside, other=0).to(tl.int32) + u
    tl.store(place, clamp(staged, 127).to(tl.int8), mask=inside)

    if stage_E is not None:
        T = decode(load_codes(T_packed, n, N, K, byte, byte_inside, 1), 1)
        part = tl.sum(G * T.to(tl.float32), 1)
        if slope is not None:
            tl.store(slope + n.to(tl.int64) * tiles + tile_k, part, mask=n < N)
        else:
            vote = n.to(tl.int64) * groups + group
            votes = tl.load(stage_E + vote, mask=n < N, other=0).to(tl.int32)
            votes += (part > 0).to(tl.int32) - (part < 0).to(tl.int32)
            tl.store(stage_E + vote, clamp(votes, 127).to(tl.int8), mask=n < N)


@triton.jit
def commit_kernel(
    T_packed: tl.tensor,
    T_accum: tl.tensor,
    T_momentum: tl.tensor,
    rng: tl.tensor,
    stage: tl.tensor,
    status: tl.tensor,
    refuse: tl.tensor,
    step: tl.tensor,
    bar: tl.tensor,
    theta: tl.tensor,
    unit: tl.tensor,
    limit: tl.tensor,
    gain: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    group_size: tl.tensor,
    chunks: tl.tensor,
    tiles: tl.tensor,
    FACTORED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS_TOGETHER: tl.constexpr,
) -> None:
    """One tile, BLOCK_C packed bytes of BLOCK_N rows: clears its stage and, unless refused, steps its integers.

    ``step`` is what an accumulator loses for a unit of momentum (`factored`) or for a vote (`sign`), and ``bar`` where
    a trit steps; theta, unit and limit are those of `FORMS`, gain is 1 - MOMENTUM_DECAY. The first weights of all bytes
    are stepped together, then the second and so on: each is a run of neighbours, that so many bytes are loaded at once
    as ALIGNED says. 1: a group may end within the tile.
    """
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) % tiles
    group = tile // chunks
    place = tile % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = (n < N)[:, None]
    if ALIGNED > 1:
        size, bytes_a_row = group_size, tl.multiple_of(K // 4, ALIGNED)
        quarter = tl.multiple_of(group_size // 4, ALIGNED)
        start, byte = tl.multiple_of(group * group_size, ALIGNED), tl.multiple_of(group * quarter, ALIGNED) + place
        in_bytes = rows
    else:
        size, bytes_a_row = tl.minimum(group_size, K - group * group_size), (K + 3) // 4
        quarter = (size + 3) // 4
        start, byte = group * group_size, group * (group_size // 4) + place
        in_bytes = rows & (place < quarter)[None, :]
    packed = T_packed + n.to(tl.int64)[:, None] * bytes_a_row + byte[None, :]
    codes = tl.load(packed, mask=in_bytes, other=0).to(tl.int32)
    moved_codes = tl.zeros_like(codes)
    count = tl.load(status + 1)
    active = (tl.load(refuse) == 0) & (count > 0)
    # unit is a power of two: the mean times unit, as the reference has it, is the same.
    mean = tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32)) * unit
    for i in tl.static_range(4):
        k = start + i * quarter + place
        inside = rows if ALIGNED > 1 else in_bytes & (i * quarter + place < size)[None, :]
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        staged = tl.load(stage + at, mask=inside, other=0).to(tl.float32)
        tl.store(stage + at, tl.zeros((BLOCK_N, BLOCK_C), tl.int8), mask=inside)
        if active:
            # Two shifts sign-extend a 2-bit code: it is two's complement.
            T = (codes << (30 - 2 * i)) >> 30
            state = tl.load(T_accum + at, mask=inside, other=0).to(tl.int32)
            bits = random_bits(rng, tl.full((), _ACCUMULATOR_STREAM, tl.int32), n, k, K, WORDS_TOGETHER)
            if FACTORED:
                if T_momentum is None:
                    accum, momentum = (state << 28) >> 28, (state >> 4).to(tl.float32)
                else:
                    accum = state
                    momentum = tl.load(T_momentum + at, mask=inside, other=0).to(tl.float32)
                more_bits = random_bits(rng, tl.full((), _MOMENTUM_STREAM, tl.int32), n, k, K, WORDS_TOGETHER)
                momentum += floor(add_uniform((staged * mean - momentum) * gain, more_bits))
                momentum = clamp(momentum, limit)
                accum -= floor_to_int(add_uniform(momentum * step, bits))
                moved = clamp(T + (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32), 1)
                accum = clamp(accum - 2 * theta * (moved - T), theta)
                if T_momentum is None:
                    accum = (accum & 15) | (to_int(momentum) << 4)
                else:
                    tl.store(T_momentum + at, to_int(momentum).to(tl.int8), mask=inside)
            else:
                accum = state - floor_to_int(add_uniform(staged * step, bits))
                turn = (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32)
                moved = clamp(T + turn, 1)
                accum = clamp(tl.where(turn != 0, 0, accum), 127)
            tl.store(T_accum + at, accum.to(tl.int8), mask=inside)
            code = moved & 3 if ALIGNED > 1 else tl.where(inside, moved & 3, 0)
            moved_codes |= code << (2 * i)
    if active:
        tl.store(packed, moved_codes.to(tl.uint8), mask=in_bytes)


def update_stage(
    grad_y: Sequence[Tensor],
    x: Tensor,
    T_packed: Sequence[Tensor],
    row_log2: Sequence[Tensor],
    col_log2: Sequence[Tensor],
    rng: Sequence[Tensor],
    stage: Sequence[Tensor],
    stage_E: Sequence[Tensor],
    stage_row: Sequence[Tensor],
    stage_col: Sequence[Tensor],
    status: Sequence[Tensor],
    group_size: int,
    rule: str,
) -> None:
    """Add one micro-batch's integers to the stage of some layers that share x; see `ternarize.ops` for shapes."""
    inputs = x.reshape(-1, x.shape[-1])
    for i, gradient in enumerate(grad_y):
        rows = gradient.reshape(-1, gradient.shape[-1])
        votes = stage_E[i] if stage_E else None
        with torch.cuda.device_of(x):
            factors = normalisers(row_log2[i], col_log2[i]) if rule == "factored" else None
            if factors is not None and votes is None and update_tma.takes(rows, inputs):
                parts = update_tma.stage_factored(rows, inputs, *factors, rng[i], stage[i], status[i])
            else:
                parts = stage_anywhere(
                    rows, inputs, T_packed[i], factors, rng[i], stage[i], votes, status[i], group_size
                )
            # After the tiles: all their programs draw from the stream of the same count.
            finish_stage(status[i], (stage_row[i], stage_col[i]) if factors is not None else None, parts)


def stage_anywhere(
    grad_y: Tensor,
    x: Tensor,
    T_packed: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    rng: Tensor,
    stage: Tensor,
    stage_E: Tensor | None,
    status: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor] | None:
    """Add the integers and votes of one micro-batch to a layer's stage: any rule, dtype, shape and strides.

    Args:
        grad_y: [M, N].
        x: [M, K].
        T_packed: uint8 [N, B].
        factors: float32 [N] and [K] of `normalisers`, for the rule `factored`.
        rng: int64 [3].
        stage: int8 [N, K].
        stage_E: int8 [N, G], if exponents are trained.
        status: int32 [2].
        group_size: g.

    Returns:
        With ``factors``, sums of G² over the rows and columns of each tile, float32 [tiles, N] and [tiles, K].
    """
    (M, N), K = grad_y.shape, x.shape[1]
    groups = groups_per_row(K, group_size)
    # Only votes need T, and with it tiles that keep to groups.
    tiled_as = ROW if stage_E is None else group_size
    size, chunks, tiles, BLOCK_C = tiling(K, tiled_as)
    # More rows spill registers.
    BLOCK_N = 64
    tiles_n = triton.cdiv(N, BLOCK_N)
    row_factor, col_factor = factors if factors is not None else (None, None)
    parts = None
    if factors is not None:
        parts = stage.new_empty((tiles, N), dtype=torch.float32), stage.new_empty((tiles_n, K), dtype=torch.float32)
    row_parts, col_parts = parts if parts is not None else (None, None)
    slope = stage.new_empty((N, tiles), dtype=torch.float32) if stage_E is not None and chunks > 1 else None
    stage_kernel[(tiles_n * tiles,)](
        grad_y,
        x,
        T_packed,
        row_factor,
        col_factor,
        rng,
        stage,
        stage_E,
        slope,
        row_parts,
        col_parts,
        status,
        M,
        N,
        K,
        size,
        groups,
        chunks,
        tiles,
        *grad_y.stride(),
        *x.stride(),
        BLOCK_M=32 if x.dtype == torch.float32 else 64,
        BLOCK_N=BLOCK_N,
        BLOCK_C=BLOCK_C,
        WORDS_TOGETHER=words_together(K, tiled_as),
        UPCAST=INTERPRETED,
        num_warps=8,
        enable_fp_fusion=False,
    )
    if slope is not None and stage_E is not None:
        signs = torch.sign(slope.view(N, groups, chunks).sum(2)).to(torch.int16)
        stage_E.copy_((stage_E.to(torch.int16) + signs).clamp(-127, 127))
    return parts


def alignment(size: int, in_features: int, BLOCK_C: int) -> int:
    """ALIGNED of `commit_kernel`: bytes of an aligned run of weights, if every tile of groups of ``size`` is full."""
    if in_features % size or size % (4 * BLOCK_C):
        return 1
    return math.gcd(size // 4, 16)


def update_commit(
    T_packed: Tensor,
    E: Tensor,
    T_accum: Tensor,
    T_momentum: Tensor | None,
    E_accum: Tensor | None,
    row_log2: Tensor | None,
    col_log2: Tensor | None,
    rng: Tensor,
    stage: Tensor,
    stage_E: Tensor | None,
    stage_row: Tensor | None,
    stage_col: Tensor | None,
    status: Tensor,
    refuse: Tensor,
    lr: float,
    threshold: int,
    exponent_threshold: int,
    group_size: int,
    rule: str,
) -> None:
    """Apply and clear the stage of one layer; change nothing else if ``refuse`` is set or nothing is staged."""
    N, K = T_accum.shape
    size, chunks, tiles, BLOCK_C = tiling(K, group_size)
    theta, unit, limit = reference.FORMS["int4" if T_momentum is None else "int8"]
    step, bar = lr, threshold
    if rule == "factored":
        step, bar = lr * 2 * theta / unit, theta + (T_momentum is None)
    with torch.cuda.device_of(T_packed):
        # As many bytes as 128 threads load at once. With fewer than threads, threads that hold copies could read a byte
        # that another has already stepped.
        BLOCK_N = 2048 // BLOCK_C
        commit_kernel[(triton.cdiv(N, BLOCK_N) * tiles,)](
            T_packed,
            T_accum,
            T_momentum,
            rng,
            stage,
            status,
            refuse,
            step,
            bar,
            theta,
            unit,
            float(limit),
            1 - reference.MOMENTUM_DECAY,
            N,
            K,
            size,
            chunks,
            tiles,
            FACTORED=rule == "factored",
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            ALIGNED=alignment(size, K, BLOCK_C),
            WORDS_TOGETHER=words_together(K, group_size),
            num_warps=4,
            enable_fp_fusion=False,
        )
        commit_vectors(
            E, E_accum, row_log2, col_log2, stage_E, stage_row, stage_col, status, refuse, exponent_threshold
        )
    # After all of them: each reads the count.
    status.zero_()
