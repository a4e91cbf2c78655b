"""The program of a call of any op: for graphs that are being compiled, and for ``ternarize prewarm``."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ternarize.backends.tilelang import build, host, linear, linear_int8
from ternarize.backends.tilelang.layers import LayerShape, dtype_name

_PROGRAM_FOR: dict[str, Callable[..., build.Program]] = {
    "linear": linear.program_for,
    "linear_int8": linear_int8.program_for,
}


def program_for(
    stem: str,
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    guarded: bool,
    gpu: str | None,
    rounds: bool = False,
) -> build.Program:
    """The program that a call runs, for all its layers.

    Args:
        stem: linear or linear_int8.
        M: tokens.
        layers: of the call.
        K: in_features.
        group_size: of all layers; -1 for whole rows.
        dtype: of the results.
        guarded: whether outputs that are not finite are reported.
        gpu: as `torch.cuda.get_device_name` names it, whose measured tiles are used; None for any Hopper card.
        rounds: whether a call of linear_int8 rounds x itself, see `ternarize.backends.tilelang.linear.rounds`.
    """
    if rounds:
        return linear.program_for(M, layers, K, group_size, dtype, guarded=guarded, gpu=gpu, fused=("rounds",))
    return _PROGRAM_FOR[stem](M, layers, K, group_size, dtype, guarded=guarded, gpu=gpu)


def prepare(
    stem: str,
    x: Tensor,
    T_packed: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    group_size: int,
    *,
    guarded: bool,
    rounds: bool,
) -> None:
    """Begin to build the kernel of a call that is being compiled, side by side with whatever else is.

    Those for its number of tokens; if that is dynamic, for the number at hand and for one, with which decoding goes on.

    Args:
        stem: linear or linear_int8.
        x: before it is quantised; fake, as are the other tensors, whose shapes are those of `ternarize.ops`.
        T_packed: of each layer.
        E_mantissa: likewise.
        bias: likewise.
        group_size: of all layers.
        guarded: whether the kernels will report outputs that are not finite.
        rounds: whether the call rounds x itself, as for `program_for`.
    """
    rows = math.prod(x.shape[:-1])
    tokens = [rows] if isinstance(rows, int) else [rows.node.hint, 1] if rows.node.has_hint() else [1]
    layers, K = host.layer_shapes(T_packed, E_mantissa, bias), int(x.shape[-1])
    for M in tokens:
        if M > 0:
            gpu = host.gpu_name(x.device)
            build.start(program_for(stem, M, layers, K, group_size, x.dtype, guarded=guarded, gpu=gpu, rounds=rounds))


def prepare_update(dtype: torch.dtype) -> None:
    """Begin to build the kernel that stages gradients of this dtype: one is for all layers."""
    build.start(build.UpdateProgram(dtype=dtype_name(dtype)))
