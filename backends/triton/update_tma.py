"""The stage of `factored` on Hopper: G by tensor memory accelerator and wgmma, made integers where it was summed.

A tile of G takes half of the registers of its warps, and its integers about 23 instructions a weight. They are made a
slice of columns at a time, which spills nothing. Tiles are numbered in panels of rows, so that those that run together
share operands in L2.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton.launch import ceil_div, launch
from ternarize.backends.triton.packed import multiprocessors
from ternarize.backends.triton.rounding import clamp, gradient_bits, load_key, round_off, to_fixed

_CLIP = tl.constexpr(reference.CLIP)
_NONFINITE_GRADIENT = tl.constexpr(reference.NONFINITE_GRADIENT)
_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)

#: Compute capability of Hopper. Later architectures have other tensor cores, on which this was not tried.
_CAPABILITY = 9

#: A row of a tensor descriptor starts at a multiple of so many bytes (CUDA driver API, cuTensorMapEncodeTiled).
_ALIGNMENT = 16


class Tile(NamedTuple):
    """How G is cut, and how a tile is compiled."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_M: int
    """Tokens of a step of the sum."""
    SLICES: int
    """Parts of the columns that are made integers one after the other, 2 or 4, of a multiple of 32 columns each."""
    num_stages: int
    num_warps: int
    PANEL: int
    """Rows of tiles that are taken together, column by column."""
    TERAFLOPS: float
    """What an SM does with it, as measured on an H200 (docs/figures-training.md)."""


#: From large to small.
TILES = (
    Tile(256, 128, 64, SLICES=4, num_stages=4, num_warps=8, PANEL=8, TERAFLOPS=6.0),
    Tile(128, 128, 64, SLICES=4, num_stages=3, num_warps=4, PANEL=16, TERAFLOPS=5.1),
    Tile(64, 64, 64, SLICES=2, num_stages=4, num_warps=4, PANEL=8, TERAFLOPS=3.0),
)


@triton.jit
def halves(tile: tl.tensor) -> tl.tuple:
    """The left and the right half of the columns: in registers already, so nothing moves."""
    apart = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(apart, (0, 2, 1)))


@triton.jit
def factors(col_factor: tl.tensor, first: tl.tensor, K: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Factors of columns from ``first`` on."""
    k = first + tl.arange(0, WIDTH)
    return tl.load(col_factor + k, mask=k < K, other=0.0)


@triton.jit
def stage_slice(
    G: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    key: tl.tuple,
    count: tl.tensor,
    stage: tl.tensor,
    col_part: tl.tensor,
    n: tl.tensor,
    first: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    WARPS: tl.constexpr,
) -> tl.tensor:
    """Stage the columns of G from ``first`` on, given the factors; returns the sums of squares of its rows."""
    ROWS: tl.constexpr = G.shape[0]
    WIDTH: tl.constexpr = G.shape[1]
    k = first + tl.arange(0, WIDTH)
    place = stage + n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    # Early, because it takes long. For the first micro-batch nothing: what is there belongs to an earlier step.
    filled = tl.where(count > 0, N, 0)
    staged = tl.load(place, mask=(n < filled)[:, None] & (k < K)[None, :])
    square = G * G
    # Warp w has rows 16 · w to 16 · w + 15 of every 16 · WARPS. What it adds stays within it.
    of_warps = tl.reshape(square, (ROWS // (16 * WARPS), WARPS, 16, WIDTH))
    part = col_part + (tl.arange(0, WARPS).to(tl.int64) * K)[:, None] + k[None, :]
    tl.store(part, tl.sum(tl.sum(of_warps, 0), 1), mask=(k < K)[None, :])
    bits = gradient_bits(key, count, n, first // 32 + tl.arange(0, WIDTH // 32), tl.cdiv(K, 32), G)
    u = round_off(to_fixed(clamp(G * rows[:, None] * columns[None, :], _CLIP)), bits).to(tl.int8)
    if count > 0:
        u = clamp(staged.to(tl.int32) + u.to(tl.int32), 127).to(tl.int8)
    tl.store(place, u, mask=inside)
    return tl.sum(square, 1)


@triton.jit
def stage_tma_kernel(
    grad_y: tl.tensor,
    x: tl.tensor,
    row_factor: tl.tensor,
    col_factor: tl.tensor,
    rng: tl.tensor,
    stage: tl.tensor,
    row_parts: tl.tensor,
    col_parts: tl.tensor,
    status: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    PANEL: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """One tile of the stage, [BLOCK_N, BLOCK_K]; descriptors have tiles of [BLOCK_M, BLOCK_N] and [BLOCK_M, BLOCK_K].

    Each tile is a program of its own. Programs that stay, and load the next tile while they round the last, were five
    to ten times slower on an H100: their registers spill in the loop over the tokens.
    """
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    panel, place = tile // (PANEL * tiles_k), tile % (PANEL * tiles_k)
    height = tl.minimum(tiles_n - panel * PANEL, PANEL)
    tile_n, tile_k = panel * PANEL + place % height, place // height
    first_n, first_k = tile_n * BLOCK_N, tile_k * BLOCK_K
    n = first_n + tl.arange(0, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_K // SLICES
    # What the integers need is loaded before the products, and factors of columns a slice ahead: no slice waits.
    count, key = tl.load(status + 1), load_key(rng)
    rows = tl.load(row_factor + n, mask=n < N, other=0.0)
    columns = factors(col_factor, first_k, K, WIDTH)
    col_part = col_parts + tile_n.to(tl.int64) * WARPS * K
    G = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, M, BLOCK_M):
        g = grad_y.load([m, first_n])
        a = x.load([m, first_k])
        G = tl.dot(g.T, a, G, input_precision="ieee")

    left, right = halves(G)
    if SLICES == 2:
        next_columns = factors(col_factor, first_k + WIDTH, K, WIDTH)
        total = stage_slice(left, rows, columns, key, count, stage, col_part, n, first_k, N, K, WARPS)
        total += stage_slice(right, rows, next_columns, key, count, stage, col_part, n, first_k + WIDTH, N, K, WARPS)
    else:
        s0, s1 = halves(left)
        s2, s3 = halves(right)
        columns_1 = factors(col_factor, first_k + WIDTH, K, WIDTH)
        total = stage_slice(s0, rows, columns, key, count, stage, col_part, n, first_k, N, K, WARPS)
        columns_2 = factors(col_factor, first_k + 2 * WIDTH, K, WIDTH)
        total += stage_slice(s1, rows, columns_1, key, count, stage, col_part, n, first_k + WIDTH, N, K, WARPS)
        columns_3 = factors(col_factor, first_k + 3 * WIDTH, K, WIDTH)
        total += stage_slice(s2, rows, columns_2, key, count, stage, col_part, n, first_k + 2 * WIDTH, N, K, WARPS)
        total += stage_slice(s3, rows, columns_3, key, count, stage, col_part, n, first_k + 3 * WIDTH, N, K, WARPS)
    tl.store(row_parts + tile_k.to(tl.int64) * N + n, total, mask=n < N)

    # Comparisons with NaN are false. A sum that is not finite may still be one of large squares.
    if tl.max((total <= _FLOAT32_MAX).to(tl.int32) ^ 1, 0) > 0:
        broken = tl.max(tl.max((tl.abs(G) <= _FLOAT32_MAX).to(tl.int32) ^ 1, 1), 0)
        tl.atomic_or(status, _NONFINITE_GRADIENT, mask=broken > 0)


def takes(grad_y: Tensor, x: Tensor) -> bool:
    """Whether the operands, [M, N] and [M, K], can be read by tensor descriptors into wgmma."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] != _CAPABILITY:
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or x.shape[0] == 0:
        return False
    return _aligned(grad_y) and _aligned(x)


def _aligned(rows: Tensor) -> bool:
    row_bytes = rows.stride(0) * rows.element_size()
    return rows.stride(1) == 1 and row_bytes % _ALIGNMENT == 0 and rows.data_ptr() % _ALIGNMENT == 0


@functools.cache
def tile_of(N: int, K: int, processors: int) -> Tile:
    """The entry of `TILES` that should take a layer the least time on a GPU of so many SMs."""

    def time(tile: Tile) -> float:
        tiles = ceil_div(N, tile.BLOCK_N) * ceil_div(K, tile.BLOCK_K)
        # The last wave takes as long as a full one.
        return ceil_div(tiles, processors) * tile.BLOCK_N * tile.BLOCK_K / tile.TERAFLOPS

    return min(TILES, key=time)


def stage_factored(
    grad_y: Tensor,
    x: Tensor,
    row_factor: Tensor,
    col_factor: Tensor,
    rng: Tensor,
    stage: Tensor,
    status: Tensor,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the integers of one micro-batch to a layer's stage.

    Where G is not finite, `status` says so, and what is staged there has no meaning: the step is refused.

    Args:
        grad_y: [M, N] that `takes` accepts.
        x: [M, K], likewise.
        row_factor: float32 [N] of `normalisers`.
        col_factor: float32 [K].
        rng: int64 [3].
        stage: int8 [N, K].
        status: int32 [2].
        tile: other than that of `tile_of`.

    Returns:
        Sums of G² over the rows and columns of each tile, float32 [tiles, N] and [tiles, K].
    """
    (M, N), K = grad_y.shape, x.shape[1]
    tile = tile or tile_of(N, K, multiprocessors(x.device))
    tiles_n, tiles_k = ceil_div(N, tile.BLOCK_N), ceil_div(K, tile.BLOCK_K)
    warps = min(tile.num_warps, tile.BLOCK_N // 16)
    row_parts = stage.new_empty((tiles_k, N), dtype=torch.float32)
    col_parts = stage.new_empty((tiles_n * warps, K), dtype=torch.float32)
    launch(
        stage_tma_kernel,
        tiles_n * tiles_k,
        TensorDescriptor.from_tensor(grad_y, [tile.BLOCK_M, tile.BLOCK_N]),
        TensorDescriptor.from_tensor(x, [tile.BLOCK_M, tile.BLOCK_K]),
        row_factor,
        col_factor,
        rng,
        stage,
        row_parts,
        col_parts,
        status,
        M,
        N,
        K,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        SLICES=tile.SLICES,
        PANEL=tile.PANEL,
        WARPS=warps,
        num_stages=tile.num_stages,
        num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )
    return row_parts, col_parts
