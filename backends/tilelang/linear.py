"""y = x · Wᵀ + bias on Hopper's tensor cores, from the packed trits, without a decoded weight in memory."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tilelang
import torch
from torch import Tensor

from ternarize.backends.tilelang.hopper import TARGET
from ternarize.backends.tilelang.layers import Dtype, LayerShape
from ternarize.backends.tilelang.linear_decode import DecodeTile, choose_decode_tile, decode_program
from ternarize.backends.tilelang.linear_wgmma import Tile, choose_wgmma_tile, wgmma_program


def choose_tile(M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype) -> Tile | DecodeTile:
    """Which of the two programs a call runs, and its sizes.

    What `choose_decode_tile` takes goes to linear_decode.cuh, all else to wgmma.
    """
    return choose_decode_tile(M, layers, K, g, dtype) or choose_wgmma_tile(M, layers, K, g, dtype)


@functools.cache
def _compiled(
    layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, tile: Tile | DecodeTile
) -> Callable[..., None]:
    """The kernel for a call, built once a process; TileLang keeps compiled kernels on disk between them."""
    if isinstance(tile, DecodeTile):
        program = decode_program(layers, K, g, dtype, guarded=False, tile=tile)
    else:
        program = wgmma_program(layers, K, g, dtype, guarded=False, tile=tile)
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
    status: Sequence[Tensor],  # noqa: ARG001  # the programs do not report yet
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
            layers = (LayerShape(N=N, planes=1, mantissa=None, bias=b is not None),)
            kernel = _compiled(layers, K, g, dtype, choose_tile(M, layers, K, g, dtype))
            kernel(*arguments, y.view(-1, N))
    return outputs
