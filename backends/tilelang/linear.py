"""y = x · Wᵀ + bias on Hopper's tensor cores, from the packed trits, without a decoded weight in memory."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tilelang
import torch
from torch import Tensor

from ternarize.backends.tilelang.linear_decode import GROUP, DecodeTile, decode_program
from ternarize.backends.tilelang.linear_kernel import TARGET, Tile, linear_program

Dtype = Literal["bfloat16", "float16"]

#: Streaming multiprocessors of the H100 SXM and the H200.
_MULTIPROCESSORS = 132

#: A few tokens: y is narrow, reading the weight is all the time, so many loads in flight.
_NARROW = Tile(BLOCK_M=16, BLOCK_N=64, stages=6, blocks_per_multiprocessor=2)
_MIDDLE = Tile(BLOCK_M=64, BLOCK_N=64, stages=4, blocks_per_multiprocessor=2)
_MIDDLE_WIDE = Tile(BLOCK_M=64, BLOCK_N=128, stages=4)
#: The tensor cores are all the time. With groups of 256 its stages fill 216 of the 227 KiB of shared memory.
_WIDE = Tile(BLOCK_M=128, BLOCK_N=128, stages=3)
#: The fastest where it fits: bfloat16, whose sums need no second set of registers, and groups of 64 and 128. Groups of
#: 32 are copied by threads, not by TMA, and those threads leave too few registers.
_WIDEST = Tile(BLOCK_M=256, BLOCK_N=128, stages=2)

#: More tokens than this, the BLOCK_M of the next smaller tiles, are what a tile is worth its size for.
_NEXT_SMALLER = {64: 16, 128: 64, 256: 128}

TILES = (_NARROW, _MIDDLE, _MIDDLE_WIDE, _WIDE, _WIDEST)

#: Splitting K over a cluster costs a few microseconds: each part has to have so many steps.
_LEAST_STEPS = 16

#: Most shared memory of a block, and with which two blocks fit a multiprocessor: 228 KiB less 1 KiB a block.
_SHARED_BYTES, _HALF_SHARED_BYTES = 227 * 1024, 113 * 1024


def choose_tile(M: int, N: int, K: int, g: int, dtype: Dtype) -> Tile | DecodeTile:
    """How a call shares out its work: which of the two kernels, and its sizes.

    Distilled from timings of every tile at the shapes of docs/benchmarks.md on one H200. Up to 16 tokens of bfloat16
    and groups of 128 go to linear_decode.cuh, if its part of x fits. All else takes the largest tile of wgmma that
    M tokens fill and whose blocks, with K split in two where that leaves them room, keep six in ten multiprocessors
    busy. A layer too small for any splits K further.
    """
    if dtype == "bfloat16" and g == GROUP and M <= 16:
        decode = choose_decode_tile(M, N, K)
        if decode is not None:
            return decode
    tiles = [tile for tile in TILES if tile is not _WIDEST or (dtype == "bfloat16" and g in (64, 128))]
    if g > 128:
        # Stages of twice the size leave no room for a second block.
        tiles = [dataclasses.replace(tile, blocks_per_multiprocessor=1) for tile in tiles]
    filled = [tile for tile in tiles[1:] if _NEXT_SMALLER[tile.BLOCK_M] < M]
    for tile in reversed(filled):
        split = _split(tile, M, N, K // g, most=2, blocks_at_once=_MULTIPROCESSORS)
        if _blocks(tile, M, N) * split >= 0.6 * _MULTIPROCESSORS:
            return dataclasses.replace(tile, split=split)
    tile = filled[0] if filled else tiles[0]
    at_once = _MULTIPROCESSORS * (1 if filled else tile.blocks_per_multiprocessor)
    return dataclasses.replace(tile, split=_split(tile, M, N, K // g, most=8, blocks_at_once=at_once))


def _blocks(tile: Tile, M: int, N: int) -> int:
    return -(-M // tile.BLOCK_M) * -(-N // tile.BLOCK_N)


def _split(tile: Tile, M: int, N: int, steps: int, *, most: int, blocks_at_once: int) -> int:
    """Into how many parts K is split: as many as still run at once and have steps enough."""
    blocks = _blocks(tile, M, N)
    return max(
        split
        for split in (1, 2, 4, 8)
        if split == 1
        or (
            split <= most and blocks * split <= blocks_at_once and steps % split == 0 and steps // split >= _LEAST_STEPS
        )
    )


def choose_decode_tile(M: int, N: int, K: int) -> DecodeTile | None:
    """The sizes of linear_decode.cuh for up to 16 tokens, or None where its part of x does not fit shared memory.

    A warp loads 2 KiB of weights at once, four groups of 16 rows where the groups allow. One block of sixteen warps
    fills a multiprocessor. K is split over a cluster of two blocks, but for short rows and few tokens, and over as many
    warps of a block as have no row block of their own. Where half of x is too much, eight blocks of half the size share
    it, two to a multiprocessor.
    """
    groups = K // GROUP
    step = next(step for step in (4, 2, 1) if groups % step == 0)
    # Sixteen tokens take the registers of the third and fourth tile.
    tiles = min(4 // step, 4 if M <= 8 else 2)
    if 16 * tiles > N:
        return None
    row_blocks = -(-N // (16 * tiles))
    for warps, blocks_per_multiprocessor, cluster, room in (
        (16, 1, 1 if K <= 4096 and M <= 8 else 2, _SHARED_BYTES),
        (8, 2, 8, _HALF_SHARED_BYTES),
    ):
        clusters = min(row_blocks, blocks_per_multiprocessor * _MULTIPROCESSORS // cluster)
        blocks = -(-row_blocks // clusters)
        splits = [k_warps for k_warps in (1, 2, 4, 8, 16) if k_warps <= warps and cluster * k_warps <= groups // step]
        if not splits:
            continue
        tile = DecodeTile(
            TOKENS=8 if M <= 8 else 16,
            TILES=tiles,
            STEP=step,
            WARPS=warps,
            K_WARPS=next((k_warps for k_warps in splits if warps // k_warps <= blocks), splits[-1]),
            CLUSTER=cluster,
            CLUSTERS=clusters,
            blocks_per_multiprocessor=blocks_per_multiprocessor,
        )
        if tile.shared_bytes(N, K) <= room:
            return tile
    return None


@functools.cache
def _compiled(N: int, K: int, g: int, dtype: Dtype, has_bias: bool, tile: Tile | DecodeTile) -> Callable[..., None]:
    """The kernel for one layer shape, built once a process; TileLang keeps compiled kernels on disk between them."""
    if isinstance(tile, DecodeTile):
        program = decode_program(N, K, has_bias=has_bias, tile=tile)
    else:
        program = linear_program(N, K, g, dtype, has_bias=has_bias, tile=tile)
    kernel: Callable[..., None] = tilelang.compile(program, target=TARGET)
    return kernel


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16 bytes: a copy if it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def linear(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],  # noqa: ARG001  # the same arguments in every backend; none here, see verify
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    group_size: int,
) -> list[Tensor]:
    """Linear layers that share their input; see `ternarize.ops` for shapes, and `verify` for what is accepted.

    Accumulates in float32 and rounds once, to the dtype of x.
    """
    K = x.shape[-1]
    g = group_size if group_size > 0 else K
    rows = _aligned(x).view(-1, K)
    M = rows.shape[0]
    outputs = [x.new_empty((*x.shape[:-1], packed.shape[0])) for packed in T_packed]
    if M == 0:
        return outputs
    dtype: Dtype = "bfloat16" if x.dtype == torch.bfloat16 else "float16"
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(x.device):
        for i, y in enumerate(outputs):
            arguments: list[Any] = [rows, _aligned(T_packed[i]), _aligned(E[i])]
            b, exponent = bias[i], bias_exponent[i]
            if b is not None and exponent is not None:
                arguments += [b, exponent]
            N = y.shape[-1]
            kernel = _compiled(N, K, g, dtype, b is not None, choose_tile(M, N, K, g, dtype))
            kernel(*arguments, y.view(-1, N))
    return outputs
