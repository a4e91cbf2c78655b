"""y = (q · Wᵀ) · scale + bias on Hopper's int8 tensor cores, from the same packed trits as `linear`."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.backends.tilelang.build import Program
from ternarize.backends.tilelang.host import launch
from ternarize.backends.tilelang.layers import LayerShape, dtype_name
from ternarize.backends.tilelang.linear_decode import choose_decode_tile
from ternarize.backends.tilelang.linear_wgmma import choose_wgmma_tile


@functools.lru_cache(maxsize=4096)
def program_for(
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    guarded: bool,
    gpu: str | None,  # noqa: ARG001  # the arguments of `linear`'s; tiles of these programs are not tuned
) -> Program:
    """The program that a call of M tokens runs, one for all layers."""
    g = group_size if group_size > 0 else K
    name = dtype_name(dtype)
    decode = choose_decode_tile(M, layers, K, g, "int8")
    tile = decode or choose_wgmma_tile(M, layers, K, g, name, "int8")
    return Program(layers=layers, K=K, g=g, dtype=name, activation="int8", guarded=guarded, tile=tile)


def linear_int8(
    q: Tensor,
    scale: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    status: Sequence[Tensor],
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Linear layers that share their quantised input; see `ternarize.ops` for shapes, `verify` for what is accepted.

    Sums are exact in int32, or in float32 over groups for a few tokens; rounds once, to ``dtype``.
    """
    return launch(program_for, [q, scale], T_packed, E, E_mantissa, bias, bias_exponent, status, group_size, dtype)
