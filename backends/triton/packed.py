"""What the kernels share: the columns of a tile, decoding, scales and random numbers.

A tile takes BLOCK_C packed bytes of one group, and so up to 4 · BLOCK_C of its weights: decoded, byte c gives columns
c, BLOCK_C + c, 2 · BLOCK_C + c and 3 · BLOCK_C + c of the tile. Each of those four runs is contiguous in K. A tile
never spans two groups, so one scale a row is enough, and no byte is loaded twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ternarize.packing import ROW, groups_per_row

#: The interpreter multiplies the bit patterns of bfloat16 operands and truncates float32 to bfloat16: under it kernels
#: widen their operands and write float32, which the host rounds.
INTERPRETED: bool = triton.knobs.runtime.interpret

_MAX_BYTES = 32


class Tiling(NamedTuple):
    """How a row of weights is cut into tiles."""

    group_size: int
    """Weights a group; K for whole rows."""
    chunks: int
    """Tiles a group."""
    tiles: int
    """Tiles a row."""
    BLOCK_C: int
    """Packed bytes a tile."""


def tiling(in_features: int, group_size: int) -> Tiling:
    """Tiles of at most 32 packed bytes, 128 weights, that never span two groups."""
    size = in_features if group_size == ROW else min(group_size, in_features)
    bytes_a_group = -(-size // 4)
    block = min(_MAX_BYTES, max(4, triton.next_power_of_2(bytes_a_group)))
    chunks = -(-bytes_a_group // block)
    return Tiling(size, chunks, chunks * groups_per_row(in_features, group_size), block)


def words_together(in_features: int, group_size: int) -> bool:
    """Whether every 4 neighbouring columns of a tile start at a multiple of 4, and so share a block of Philox."""
    size = in_features if group_size == ROW else min(group_size, in_features)
    tail = in_features % size
    return -(-size // 4) % 4 == 0 and -(-tail // 4) % 4 == 0


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes where the op returns ``dtype``."""
    return torch.float32 if INTERPRETED else dtype


@triton.jit
def columns(tile: tl.tensor, K: tl.tensor, group_size: tl.tensor, chunks: tl.tensor, BLOCK_C: tl.constexpr) -> tl.tuple:
    """The columns of a tile.

    Returns:
        The group; places in the packed row [BLOCK_C] and whether each holds weights; k [4 * BLOCK_C] and likewise.
    """
    group = tile // chunks
    size = tl.minimum(group_size, K - group * group_size)
    quarter = (size + 3) // 4
    first = (tile % chunks) * BLOCK_C
    byte = first + tl.arange(0, BLOCK_C)
    column = tl.arange(0, 4 * BLOCK_C)
    place = first + column % BLOCK_C
    in_group = (column // BLOCK_C) * quarter + place
    k_inside = (place < quarter) & (in_group < size)
    return group, group * (group_size // 4) + byte, byte < quarter, group * group_size + in_group, k_inside


@triton.jit
def load_codes(
    T_packed: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    byte: tl.tensor,
    inside: tl.tensor,
    PLANES: tl.constexpr,
) -> tl.tensor:
    """int32 [BLOCK_N, BLOCK_C]: the byte of plane p in bits 8p to 8p + 7."""
    bytes_a_row = (K + 3) // 4
    mask = (n < N)[:, None] & inside[None, :]
    codes = tl.load(T_packed + n.to(tl.int64)[:, None] * bytes_a_row + byte[None, :], mask=mask, other=0).to(tl.int32)
    for plane in tl.static_range(1, PLANES):
        row = (plane * N + n).to(tl.int64)
        more = tl.load(T_packed + row[:, None] * bytes_a_row + byte[None, :], mask=mask, other=0)
        codes |= more.to(tl.int32) << (8 * plane)
    return codes


@triton.jit
def decode(codes: tl.tensor, PLANES: tl.constexpr) -> tl.tensor:
    """int32 levels [BLOCK_N, 4 * BLOCK_C] of the codes of `load_codes`, 0 where those are 0."""
    # Two shifts sign-extend a 2-bit code: it is two's complement.
    left = 30 - 2 * tl.arange(0, 4)[None, :, None]
    levels = (codes[:, None, :] << left) >> 30
    for plane in tl.static_range(1, PLANES):
        levels = 3 * levels + ((codes[:, None, :] << (left - 8 * plane)) >> 30)
    return tl.reshape(levels, (codes.shape[0], 4 * codes.shape[1]))


@triton.jit
def group_scale(
    E: tl.tensor,
    mantissa: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    group: tl.tensor,
    groups: tl.tensor,
    stride_n: tl.tensor,
    stride_g: tl.tensor,
) -> tl.tensor:
    """float32 [BLOCK_N] scales of one group: 2^E by its exponent bits, times the mantissa if there is one."""
    row = n.to(tl.int64)
    exponent = tl.load(E + row * groups + group, mask=n < N, other=0).to(tl.int32)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    if mantissa is not None:
        scale *= tl.load(mantissa + row * stride_n + group * stride_g, mask=n < N, other=0).to(tl.float32)
    return scale


@triton.jit
def uniform(
    rng: tl.tensor,
    stream: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    WORDS_TOGETHER: tl.constexpr,
) -> tl.tensor:
    """`ternarize.philox.uniform` at rows n and columns k, bit for bit.

    WORDS_TOGETHER is that of `words_together`: then a block of Philox serves four columns, else only one.
    """
    seed = tl.load(rng) & 0xFFFFFFFF
    layer = tl.load(rng + 1) & 0xFFFFFFFF
    step = tl.load(rng + 2).to(tl.uint32)
    in_row = tl.min(tl.reshape(k, (k.shape[0] // 4, 4)), 1) // 4 if WORDS_TOGETHER else k // 4
    block = n.to(tl.int64)[:, None] * ((K + 3) // 4) + in_row[None, :]
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed | (layer << 32), low, high, step, stream.to(tl.uint32))
    if WORDS_TOGETHER:
        bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (n.shape[0], k.shape[0]))
    else:
        word = (k % 4)[None, :]
        bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    # 24 bits and a power of two: the conversion and the product are exact.
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08
