"""What the kernels share: the columns of a tile, decoding and scales.

A tile takes BLOCK_C packed bytes of one group, and so up to 4 · BLOCK_C of its weights: decoded, byte c gives columns
c, BLOCK_C + c, 2 · BLOCK_C + c and 3 · BLOCK_C + c of the tile. Each of those four runs is contiguous in K. A tile
never spans two groups, so one scale a row is enough, and no byte is loaded twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def multiprocessors(device: torch.device) -> int:
    """How many programs as large as an SM run at a time; 1 in the interpreter."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


class Weight(NamedTuple):
    """A layer as kernels read it."""

    T_packed: Tensor
    """Contiguous."""
    E: Tensor
    """Contiguous."""
    mantissa: Tensor | None
    """[N, G], of any strides: one number may stand for many groups."""
    strides: tuple[int, int]
    """Of the mantissa; zeros without one."""
    planes: int

    @classmethod
    def of(cls, T_packed: Tensor, E: Tensor, E_mantissa: Tensor | None) -> "Weight":
        """From the tensors of `ternarize.ops`."""
        mantissa = None if E_mantissa is None else E_mantissa.expand_as(E)
        row, group = (0, 0) if mantissa is None else mantissa.stride()
        planes = T_packed.shape[0] if T_packed.dim() == 3 else 1
        return cls(T_packed.contiguous(), E.contiguous(), mantissa, (row, group), planes)


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
def add_bias(sums: tl.tensor, bias: tl.tensor, bias_exponent: tl.tensor, n: tl.tensor, N: tl.tensor) -> tl.tensor:
    """float32 [BLOCK_M, BLOCK_N] sums and the bias of their columns, or as they are without one."""
    if bias is not None:
        # In float64 every int32 times every 2^exponent is exact, so the bias is rounded once.
        power = ((tl.load(bias_exponent).to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        added = tl.load(bias + n, mask=n < N, other=0).to(tl.float64) * power
        sums += added.to(tl.float32)[None, :]
    return sums
