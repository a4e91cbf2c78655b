"""The integer update of `ternarize.backends.torch.update` in two kernels, equal to it bit for bit where G is exact.

`stage_kernel` holds a tile of G = grad_yᵀ · x in registers and turns it into integers there: no float [N, K] exists.
`commit_kernel` steps and packs the trits. What is [N], [K] or [N, G] sized is shared with the reference by import. Both
are launched without fused multiply-add: a floor follows, and a CPU and a GPU have to agree about it.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton.packed import (
    INTERPRETED,
    columns,
    decode,
    load_codes,
    tiling,
    uniform,
    words_together,
)
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
    stage_row: tl.tensor,
    stage_col: tl.tensor,
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

    The rule is `factored` where row_factor is given. Where stage_E is, exponents are voted on: at once if the tile
    holds the whole group, else the tile adds its part to ``slope``, float32 [N, G].
    """
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    group, byte, byte_inside, k, k_inside = columns(tl.program_id(0) % tiles, K, group_size, chunks, BLOCK_C)
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
        noise = uniform(rng, tl.load(status + 1) + _GRADIENT_STREAM, n, k, K, WORDS_TOGETHER)
        u = clamp(tl.floor(G * rows[:, None] * cols[None, :] + noise), _CLIP).to(tl.int32)
        square = G * G
        tl.atomic_add(stage_row + n, tl.sum(square, 1), mask=n < N)
        tl.atomic_add(stage_col + k, tl.sum(square, 0), mask=k_inside)
    else:
        u = (G > 0).to(tl.int32) - (G < 0).to(tl.int32)
    place = stage + n.to(tl.int64)[:, None] * K + k[None, :]
    staged = tl.load(place, mask=inside, other=0).to(tl.int32) + u
    tl.store(place, clamp(staged, 127).to(tl.int8), mask=inside)

    if stage_E is not None:
        T = decode(load_codes(T_packed, n, N, K, byte, byte_inside, 1), 1)
        part = tl.sum(G * T.to(tl.float32), 1)
        vote = n.to(tl.int64) * groups + group
        if slope is not None:
            tl.atomic_add(slope + vote, part, mask=n < N)
        else:
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
    lr: tl.tensor,
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
    WORDS_TOGETHER: tl.constexpr,
) -> None:
    """One tile of a layer: clears its stage and, unless refused, steps its integers.

    ``step`` times the learning rate is what an accumulator loses for a unit of momentum (`factored`) or for a vote
    (`sign`), and ``bar`` where a trit steps; theta, unit and limit are those of `FORMS`, gain is 1 - MOMENTUM_DECAY.
    """
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    _, byte, byte_inside, k, k_inside = columns(tl.program_id(0) % tiles, K, group_size, chunks, BLOCK_C)
    inside = (n < N)[:, None] & k_inside[None, :]
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    step *= tl.load(lr)
    staged = tl.load(stage + place, mask=inside, other=0).to(tl.float32)
    tl.store(stage + place, tl.zeros((BLOCK_N, 4 * BLOCK_C), tl.int8), mask=inside)
    count = tl.load(status + 1)
    if (tl.load(refuse) == 0) & (count > 0):
        T = decode(load_codes(T_packed, n, N, K, byte, byte_inside, 1), 1)
        state = tl.load(T_accum + place, mask=inside, other=0).to(tl.int32)
        rounding = uniform(rng, tl.full((), _ACCUMULATOR_STREAM, tl.int32), n, k, K, WORDS_TOGETHER)
        if FACTORED:
            u = staged * tl.div_rn(1.0, count.to(tl.float32))
            if T_momentum is None:
                accum, momentum = (state << 28) >> 28, (state >> 4).to(tl.float32)
            else:
                accum = state
                momentum = tl.load(T_momentum + place, mask=inside, other=0).to(tl.float32)
            noise = uniform(rng, tl.full((), _MOMENTUM_STREAM, tl.int32), n, k, K, WORDS_TOGETHER)
            momentum = clamp(momentum + tl.floor((u * unit - momentum) * gain + noise), limit)
            accum -= tl.floor(momentum * step + rounding).to(tl.int32)
            moved = clamp(T + (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32), 1)
            accum = clamp(accum - 2 * theta * (moved - T), theta)
            if T_momentum is None:
                accum = (accum & 15) | (momentum.to(tl.int32) << 4)
            else:
                tl.store(T_momentum + place, momentum.to(tl.int8), mask=inside)
        else:
            accum = state - tl.floor(staged * step + rounding).to(tl.int32)
            turn = (accum >= bar).to(tl.int32) - (accum <= -bar).to(tl.int32)
            moved = clamp(T + turn, 1)
            accum = clamp(tl.where(turn != 0, 0, accum), 127)
        tl.store(T_accum + place, accum.to(tl.int8), mask=inside)
        codes = tl.where(k_inside[None, :], moved & 3, 0)
        shift = 2 * tl.arange(0, 4)[None, :, None]
        # The four codes of a byte share no bit: their sum is their union.
        packed = tl.sum(tl.reshape(codes, (BLOCK_N, 4, BLOCK_C)) << shift, 1)
        at = T_packed + n.to(tl.int64)[:, None] * ((K + 3) // 4) + byte[None, :]
        tl.store(at, packed.to(tl.uint8), mask=(n < N)[:, None] & byte_inside[None, :])


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
    K = x.shape[-1]
    inputs = x.reshape(-1, K)
    groups = groups_per_row(K, group_size)
    # Only votes need T, and with it tiles that keep to groups.
    tiled_as = group_size if stage_E else ROW
    size, chunks, tiles, BLOCK_C = tiling(K, tiled_as)
    for i, gradient in enumerate(grad_y):
        N = gradient.shape[-1]
        rows = gradient.reshape(-1, N)
        factored = rule == "factored"
        row_factor, col_factor = reference.normalisers(row_log2[i], col_log2[i]) if factored else (None, None)
        slope = torch.zeros(N, groups, device=x.device) if stage_E and chunks > 1 else None
        with torch.cuda.device_of(x):
            # More rows spill registers.
            BLOCK_N = 64
            stage_kernel[(triton.cdiv(N, BLOCK_N) * tiles,)](
                rows,
                inputs,
                T_packed[i],
                row_factor,
                col_factor,
                rng[i],
                stage[i],
                stage_E[i] if stage_E else None,
                slope,
                stage_row[i] if factored else None,
                stage_col[i] if factored else None,
                status[i],
                rows.shape[0],
                N,
                K,
                size,
                groups,
                chunks,
                tiles,
                *rows.stride(),
                *inputs.stride(),
                BLOCK_M=32 if x.dtype == torch.float32 else 64,
                BLOCK_N=BLOCK_N,
                BLOCK_C=BLOCK_C,
                WORDS_TOGETHER=words_together(K, tiled_as),
                UPCAST=INTERPRETED,
                num_warps=8,
                enable_fp_fusion=False,
            )
        if slope is not None:
            votes = stage_E[i].to(torch.int16) + torch.sign(slope).to(torch.int16)
            stage_E[i].copy_(votes.clamp(-127, 127))
        # After the kernel: all its programs draw from the stream of the same count.
        status[i][1] += 1


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
    lr: Tensor,
    threshold: int,
    exponent_threshold: int,
    group_size: int,
    rule: str,
) -> None:
    """Apply and clear the stage of one layer; change nothing else if ``refuse`` is set or nothing is staged."""
    N, K = T_accum.shape
    size, chunks, tiles, BLOCK_C = tiling(K, group_size)
    theta, unit, limit = reference.FORMS["int4" if T_momentum is None else "int8"]
    step, bar = 1.0, threshold
    if rule == "factored":
        step, bar = 2 * theta / unit, theta + (T_momentum is None)
    with torch.cuda.device_of(T_packed):
        # 1024 weights a tile: the random numbers take registers, and with fewer bytes than threads, threads that hold
        # copies could read a byte that another has already stepped.
        BLOCK_N = 256 // BLOCK_C
        commit_kernel[(triton.cdiv(N, BLOCK_N) * tiles,)](
            T_packed,
            T_accum,
            T_momentum,
            rng,
            stage,
            status,
            refuse,
            lr,
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
            WORDS_TOGETHER=words_together(K, group_size),
            num_warps=4,
            enable_fp_fusion=False,
        )
    active = (refuse == 0) & (status[1] > 0)
    reference.commit_groups_and_vectors(
        E, E_accum, row_log2, col_log2, stage_E, stage_row, stage_col, status, active, exponent_threshold
    )


update_apply = functools.partial(reference.update_apply, halves=(update_stage, update_commit))
