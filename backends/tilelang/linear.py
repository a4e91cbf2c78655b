"""y = x · Wᵀ + bias on Hopper's tensor cores, from the packed trits, without a decoded weight in memory."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import tilelang
import torch
from torch import Tensor

from ternarize.backends.tilelang.linear_kernel import TARGET, linear_program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Shape of the part of y that one block computes, and how far it loads ahead."""

    BLOCK_M: int
    """Tokens."""
    BLOCK_N: int
    """Outputs: 64 for each warpgroup."""
    stages: int
    """Steps along K, of one scale group each, that are in flight."""


#: A few tokens: y is narrow, reading the weight is all the time, so many loads in flight.
_NARROW = Tile(BLOCK_M=16, BLOCK_N=64, stages=6)
_MIDDLE = Tile(BLOCK_M=64, BLOCK_N=64, stages=4)
#: The tensor cores are all the time. With groups of 256 its stages fill 216 of the 227 KiB of shared memory.
_WIDE = Tile(BLOCK_M=128, BLOCK_N=128, stages=3)

TILES = (_NARROW, _MIDDLE, _WIDE)

#: Streaming multiprocessors of the H100 SXM and the H200.
_MULTIPROCESSORS = 132


def choose_tile(M: int, N: int) -> Tile:
    """The largest tile that M tokens fill and whose blocks are enough for every multiprocessor."""
    wide_blocks = -(-M // _WIDE.BLOCK_M) * -(-N // _WIDE.BLOCK_N)
    if M > _MIDDLE.BLOCK_M and wide_blocks >= _MULTIPROCESSORS:
        return _WIDE
    return _MIDDLE if M > _NARROW.BLOCK_M else _NARROW


@functools.cache
def _compiled(
    N: int, K: int, g: int, dtype: Literal["bfloat16", "float16"], has_bias: bool, tile: Tile
) -> Callable[..., None]:
    """The kernel for one layer shape, built once a process; TileLang keeps compiled kernels on disk between them."""
    program = linear_program(N, K, g, dtype, has_bias=has_bias, **dataclasses.asdict(tile))
    kernel: Callable[..., None] = tilelang.compile(program, target=TARGET)
    return kernel


def _readable_by_tma(tensor: Tensor) -> Tensor:
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
    rows = _readable_by_tma(x).view(-1, K)
    outputs = [x.new_empty((*x.shape[:-1], packed.shape[0])) for packed in T_packed]
    if rows.shape[0] == 0:
        return outputs
    dtype: Literal["bfloat16", "float16"] = "bfloat16" if x.dtype == torch.bfloat16 else "float16"
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(x.device):
        for i, y in enumerate(outputs):
            arguments: list[Any] = [rows, _readable_by_tma(T_packed[i]), E[i].contiguous()]
            b, exponent = bias[i], bias_exponent[i]
            if b is not None and exponent is not None:
                arguments += [b, exponent]
            N = y.shape[-1]
            kernel = _compiled(N, K, g, dtype, b is not None, choose_tile(rows.shape[0], N))
            kernel(*arguments, y.view(-1, N))
    return outputs
