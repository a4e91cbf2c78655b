"""y = x · Wᵀ + bias on Hopper's tensor cores, from the packed trits, without a decoded weight in memory."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.backends.tilelang.build import Program
from ternarize.backends.tilelang.host import launch
from ternarize.backends.tilelang.layers import Dtype, LayerShape, dtype_name
from ternarize.backends.tilelang.linear_decode import DecodeTile, choose_decode_tile
from ternarize.backends.tilelang.linear_wgmma import Tile, choose_wgmma_tile
from ternarize.backends.tilelang.tuned import tuned_tile
from ternarize.config import Activation


@functools.lru_cache(maxsize=4096)
def choose_tile(
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    g: int,
    dtype: Dtype,
    gpu: str | None = None,
    activation: Activation = "float",
) -> Tile | DecodeTile:
    """Which of the two programs a call runs, and its sizes.

    What was measured comes first (`ternarize.backends.tilelang.tuned`), for ``gpu`` as `torch.cuda.get_device_name`
    names it, or for any Hopper card if None; programs of int8 activations are not tuned. Else what `choose_decode_tile`
    takes goes to linear_decode.cuh, and all that is left to wgmma.
    """
    tuned = tuned_tile(gpu, M, layers, K, g, dtype) if activation == "float" else None
    return tuned or heuristic_tile(M, layers, K, g, dtype, activation)


def heuristic_tile(
    M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, activation: Activation = "float"
) -> Tile | DecodeTile:
    """The choice of `choose_tile` where nothing was measured."""
    decode = choose_decode_tile(M, layers, K, g, activation)
    return decode or choose_wgmma_tile(M, layers, K, g, dtype, activation)


def program_for(
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    guarded: bool,
    gpu: str | None,
    activation: Activation = "float",
) -> Program:
    """The program that a call of M tokens runs on a GPU, named as for `choose_tile`: one for all layers."""
    g = group_size if group_size > 0 else K
    name = dtype_name(dtype)
    tile = choose_tile(M, layers, K, g, name, gpu, activation)
    return Program(layers=layers, K=K, g=g, dtype=name, activation=activation, guarded=guarded, tile=tile)


def linear(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    status: Sequence[Tensor],
    group_size: int,
) -> list[Tensor]:
    """Linear layers that share their input; see `ternarize.ops` for shapes, and `verify` for what is accepted.

    Accumulates in float32 and rounds once, to the dtype of x.
    """
    return launch(program_for, [x], T_packed, E, E_mantissa, bias, bias_exponent, status, group_size, x.dtype)
