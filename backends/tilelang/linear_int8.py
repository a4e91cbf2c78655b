"""y = (q · Wᵀ) · scale + bias on Hopper's int8 tensor cores, from the same packed trits as `linear`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tilelang
import torch
from torch import Tensor

from ternarize.backends.tilelang.hopper import TARGET
from ternarize.backends.tilelang.layers import Dtype
from ternarize.backends.tilelang.linear import _aligned
from ternarize.backends.tilelang.linear_int8_decode import Int8DecodeTile, choose_int8_decode_tile, int8_decode_program
from ternarize.backends.tilelang.linear_int8_wgmma import Int8Tile, choose_int8_wgmma_tile, int8_wgmma_program


def choose_tile(M: int, N: int, K: int, g: int) -> Int8Tile | Int8DecodeTile:
    """Which of the two programs a call runs, and its sizes."""
    return choose_int8_decode_tile(M, N, K, g) or choose_int8_wgmma_tile(M, N, K, g)


@functools.cache
def _compiled(N: int, K: int, g: int, dtype: Dtype, has_bias: bool, tile: Int8Tile | Int8DecodeTile) -> Callable[..., None]:
    """The kernel for one layer shape, built once a process; TileLang keeps compiled kernels on disk between them."""
    if isinstance(tile, Int8DecodeTile):
        program = int8_decode_program(N, K, dtype, has_bias=has_bias, tile=tile)
    else:
        program = int8_wgmma_program(N, K, g, dtype, has_bias=has_bias, tile=tile)
    kernel: Callable[..., None] = tilelang.compile(program, target=TARGET)
    return kernel


def linear_int8(
    q: Tensor,
    scale: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],  # noqa: ARG001  # the same arguments in every backend; none here, see verify
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    status: Sequence[Tensor],  # noqa: ARG001  # the programs do not report yet
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Linear layers that share their quantised input; see `ternarize.ops` for shapes, `verify` for what is accepted.

    Sums are exact in int32, or in float32 over groups for a few tokens; rounds once, to ``dtype``.
    """
    K = q.shape[-1]
    g = group_size if group_size > 0 else K
    rows, scales = _aligned(q).view(-1, K), scale.contiguous().view(-1)
    M = rows.shape[0]
    outputs = [q.new_empty((*q.shape[:-1], packed.shape[0]), dtype=dtype) for packed in T_packed]
    if M == 0:
        return outputs
    name: Dtype = "bfloat16" if dtype == torch.bfloat16 else "float16"
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(q.device):
        for i, y in enumerate(outputs):
            arguments: list[Any] = [rows, scales, _aligned(T_packed[i]), _aligned(E[i])]
            b, exponent = bias[i], bias_exponent[i]
            if b is not None and exponent is not None:
                arguments += [b, exponent]
            N = y.shape[-1]
            kernel = _compiled(N, K, g, name, b is not None, choose_tile(M, N, K, g))
            kernel(*arguments, y.view(-1, N))
    return outputs
