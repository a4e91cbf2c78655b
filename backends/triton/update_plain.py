"""The stage of an update, whatever the rule, dtype, shape and strides; `update_tma` is faster where it can run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.packed import INTERPRETED, columns, decode, load_codes, tiling
from ternarize.backends.triton.rounding import (
    clamp,
    gradient_bits,
    gradient_bits_apart,
    load_key,
    round_off,
    to_fixed,
)
from ternarize.packing import ROW, groups_per_row

_CLIP = tl.constexpr(reference.CLIP)
_NONFINITE_GRADIENT = tl.constexpr(reference.NONFINITE_GRADIENT)
_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


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
    RUNS_OF_32: tl.constexpr,
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

    count = tl.load(status + 1)
    if row_factor is not None:
        rows = tl.load(row_factor + n, mask=n < N, other=0.0)
        cols = tl.load(col_factor + k, mask=k_inside, other=0.0)
        key = load_key(rng)
        if RUNS_OF_32:
            run = tl.min(tl.reshape(k, (BLOCK_C // 8, 32)), 1) // 32
            bits = gradient_bits(key, count, n, run, tl.cdiv(K, 32), G)
        else:
            bits = gradient_bits_apart(key, count, n, k, K)
        u = round_off(to_fixed(clamp(G * rows[:, None] * cols[None, :], _CLIP)), bits)
        square = G * G
        tl.store(row_parts + tile_k.to(tl.int64) * N + n, tl.sum(square, 1), mask=n < N)
        tl.store(col_parts + tile_n.to(tl.int64) * K + k, tl.sum(square, 0), mask=k_inside)
    else:
        u = (G > 0).to(tl.int32) - (G < 0).to(tl.int32)
    place = stage + n.to(tl.int64)[:, None] * K + k[None, :]
    # For the first micro-batch nothing: what is there belongs to an earlier step.
    filled = tl.where(count > 0, N, 0)
    staged = tl.load(place, mask=(n < filled)[:, None] & k_inside[None, :], other=0).to(tl.int32)
    tl.store(place, clamp(staged + u, 127).to(tl.int8), mask=inside)

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


def runs_of_32(in_features: int, group_size: int) -> bool:
    """Whether every 32 neighbouring columns of a tile start at a multiple of 32, and so share blocks of Philox."""
    size, _, _, BLOCK_C = tiling(in_features, group_size)
    # A tile of a whole group has its columns in order, others have four runs of `BLOCK_C`.
    return in_features % size == 0 and size % (32 if size == 4 * BLOCK_C else 128) == 0


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
    tiles_n = ceil_div(N, BLOCK_N)
    row_factor, col_factor = factors if factors is not None else (None, None)
    parts = None
    if factors is not None:
        parts = stage.new_empty((tiles, N), dtype=torch.float32), stage.new_empty((tiles_n, K), dtype=torch.float32)
    row_parts, col_parts = parts if parts is not None else (None, None)
    slope = stage.new_empty((N, tiles), dtype=torch.float32) if stage_E is not None and chunks > 1 else None
    launch(
        stage_kernel,
        tiles_n * tiles,
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
        RUNS_OF_32=runs_of_32(K, tiled_as),
        UPCAST=INTERPRETED,
        num_warps=8,
        enable_fp_fusion=False,
    )
    if slope is not None and stage_E is not None:
        signs = torch.sign(slope.view(N, groups, chunks).sum(2)).to(torch.int16)
        stage_E.copy_((stage_E.to(torch.int16) + signs).clamp(-127, 127))
    return parts
