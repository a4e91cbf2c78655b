"""y = x · Wᵀ + bias on Hopper's tensor cores, from the packed trits, without a decoded weight in memory."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.backends.tilelang.build import Program
from ternarize.backends.tilelang.host import Fused, launch, layer_shapes
from ternarize.backends.tilelang.layers import Dtype, LayerShape, dtype_name
from ternarize.backends.tilelang.linear_decode import DecodeTile, choose_decode_tile, gateable
from ternarize.backends.tilelang.linear_wgmma import Tile, choose_wgmma_tile
from ternarize.backends.tilelang.tuned import tuned_tile
from ternarize.config import Activation
from ternarize.errors import ShapeError

#: Tokens from which on a call adds the residual. For fewer a kernel between two calls is worth what it takes: the
#: weights of the second one are on their way meanwhile. On an H200 (docs/figures.md).
_LEAST_RESIDUAL_TOKENS = 8

#: Most tokens that a call rounds to int8 itself: every block reads them all. On an H200 (docs/figures.md).
_MOST_ROUNDED_TOKENS = 2


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
    names it, or for any Hopper card if None. Else what `choose_decode_tile` takes goes to linear_decode.cuh, and all
    that is left to wgmma.
    """
    call = (M, layers, K, g, dtype, activation)
    return tuned_tile(gpu, *call) or heuristic_tile(*call)


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
    fused: tuple[str, ...] = (),
) -> Program:
    """The program that a call of M tokens runs on a GPU, named as for `choose_tile`: one for all layers.

    Raises:
        ShapeError: if no kernel does besides what ``fused`` names: rounds, or of `FUSED` in linear_decode.py.
    """
    g = group_size if group_size > 0 else K
    name = dtype_name(dtype)
    tile = _fused_tile(M, layers, K, g, fused) if fused else choose_tile(M, layers, K, g, name, gpu, activation)
    return Program(layers=layers, K=K, g=g, dtype=name, activation=activation, guarded=guarded, tile=tile)


def _fused_tile(M: int, layers: tuple[LayerShape, ...], K: int, g: int, asked: Sequence[str]) -> DecodeTile:
    """The tile of a call that does something besides: what `fusible` looked at, whatever is measured."""
    tile = choose_decode_tile(M, layers, K, g, rounds="rounds" in asked)
    if tile is None:
        raise ShapeError(
            f"a call of {M} tokens and {K} in_features can do nothing besides `linear`: see `fusible` and `rounds`"
        )
    can = {"rounds": True, "norm": tile.normalises(K), "residual": len(layers) == 1, "gated": gateable(layers)}
    refused = [name for name in asked if not can[name]]
    if refused:
        raise ShapeError(
            f"linear_tilelang was asked for {' and '.join(refused)} in a call of {M} tokens, {K} in_features and "
            f"{' and '.join(str(layer.N) for layer in layers)} out_features: see `fusible`"
        )
    return tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusible:
    """What a call should do beside the product; see `ternarize.ops`."""

    norm: bool
    """Normalise x first."""
    gate: bool
    """Multiply the outputs of two layers, one of them as a gate."""
    residual: bool
    """Add a residual."""


def fusible(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    group_size: int,
    *,
    rounds: bool = False,
) -> Fusible:
    """What a call of `linear` with these tensors, which may be fake, should do: linear_decode.cuh, for a few tokens.

    No symbolic size is looked at: a call that has one can do nothing more. ``rounds``: whether it rounds x already.
    """
    call = _static_call(x, T_packed, E_mantissa, group_size)
    tile = choose_decode_tile(*call, rounds=rounds) if call else None
    if tile is None:
        return Fusible(norm=False, gate=False, residual=False)
    return Fusible(norm=tile.normalises(x.shape[-1]), gate=True, residual=tile.TOKENS >= _LEAST_RESIDUAL_TOKENS)


def rounds(x: Tensor, T_packed: Sequence[Tensor], E_mantissa: Sequence[Tensor | None], group_size: int) -> bool:
    """Whether a call of int8 activations should round x itself, `linear` in place of `linear_int8`; as `fusible`."""
    call = _static_call(x, T_packed, E_mantissa, group_size)
    return call is not None and rounds_few(*call)


def rounds_few(M: int, layers: tuple[LayerShape, ...], K: int, g: int) -> bool:
    """Whether a call has so few tokens that every block should round them."""
    tile = choose_decode_tile(M, layers, K, g, rounds=True)
    return tile is not None and tile.TOKENS <= _MOST_ROUNDED_TOKENS


def _static_call(
    x: Tensor, T_packed: Sequence[Tensor], E_mantissa: Sequence[Tensor | None], group_size: int
) -> tuple[int, tuple[LayerShape, ...], int, int] | None:
    """M, layers, K and g of a call that has any rows, and no symbolic size."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not all(isinstance(size, int) for size in x.shape):
        return None
    M, K = math.prod(x.shape[:-1]), x.shape[-1]
    layers = layer_shapes(T_packed, E_mantissa, [None] * len(T_packed))
    return (M, layers, K, group_size if group_size > 0 else K) if M > 0 else None


def linear(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    status: Sequence[Tensor],
    group_size: int,
    **fused: Any,
) -> list[Tensor]:
    """Linear layers that share their input; see `ternarize.ops` for shapes, and `verify` for what is accepted.

    Accumulates in float32 and rounds once, to the dtype of x. ``fused`` is what `fusible` allows besides, the fields of
    `ternarize.backends.tilelang.host.Fused`.
    """
    weights = (T_packed, E, E_mantissa, bias, bias_exponent, status, group_size, x.dtype)
    return launch(program_for, [x], *weights, Fused(**fused))
