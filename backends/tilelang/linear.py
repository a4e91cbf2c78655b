"""y = x · Wᵀ + bias on Hopper's tensor cores, from the packed trits, without a decoded weight in memory."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.backends.tilelang import build
from ternarize.backends.tilelang.layers import Dtype, LayerShape
from ternarize.backends.tilelang.linear_decode import DecodeTile, choose_decode_tile
from ternarize.backends.tilelang.linear_wgmma import Tile, choose_wgmma_tile
from ternarize.backends.tilelang.tuned import tuned_tile


@functools.lru_cache(maxsize=4096)
def choose_tile(
    M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, gpu: str | None = None
) -> Tile | DecodeTile:
    """Which of the two programs a call runs, and its sizes.

    What was measured comes first (`ternarize.backends.tilelang.tuned`), for ``gpu`` as `torch.cuda.get_device_name`
    names it, or for any Hopper card if None. Else what `choose_decode_tile` takes goes to linear_decode.cuh, and all
    that is left to wgmma.
    """
    return tuned_tile(gpu, M, layers, K, g, dtype) or heuristic_tile(M, layers, K, g, dtype)


def heuristic_tile(M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype) -> Tile | DecodeTile:
    """The choice of `choose_tile` where nothing was measured."""
    return choose_decode_tile(M, layers, K, g, dtype) or choose_wgmma_tile(M, layers, K, g, dtype)


def layer_shapes(
    T_packed: Sequence[Tensor], E_mantissa: Sequence[Tensor | None], bias: Sequence[Tensor | None]
) -> tuple[LayerShape, ...]:
    """What programs must know of the layers of a call, from their tensors, which may be fake."""
    return tuple(
        LayerShape(
            N=int(packed.shape[-2]),
            planes=int(packed.shape[0]) if packed.dim() == 3 else 1,
            mantissa=None if mantissa is None else str(mantissa.dtype).removeprefix("torch."),
            bias=b is not None,
        )
        for packed, mantissa, b in zip(T_packed, E_mantissa, bias, strict=True)
    )


def program_for(
    M: int,
    layers: tuple[LayerShape, ...],
    K: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    guarded: bool,
    gpu: str | None,
) -> build.Program:
    """The program that a call of M tokens runs on a GPU, named as for `choose_tile`."""
    g = group_size if group_size > 0 else K
    name: Dtype = "bfloat16" if dtype == torch.bfloat16 else "float16"
    tile = choose_tile(M, layers, K, g, name, gpu)
    return build.Program(layers=layers, K=K, g=g, dtype=name, guarded=guarded, tile=tile)


def prepare(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    group_size: int,
    *,
    guarded: bool,
) -> None:
    """Begin to build the kernel of a call that is being compiled, side by side with whatever else is.

    That for its number of tokens; if that is dynamic, for the number at hand and for one, with which decoding goes on.

    Args:
        x: fake, as are the other tensors; their shapes are those of `ternarize.ops`.
        T_packed: of each layer.
        E_mantissa: likewise.
        bias: likewise.
        group_size: of all layers.
        guarded: whether the kernels will report outputs that are not finite.
    """
    rows = math.prod(x.shape[:-1])
    tokens = [rows] if isinstance(rows, int) else [rows.node.hint, 1] if rows.node.has_hint() else [1]
    layers, K = layer_shapes(T_packed, E_mantissa, bias), int(x.shape[-1])
    for M in tokens:
        if M > 0:
            build.start(program_for(M, layers, K, group_size, x.dtype, guarded=guarded, gpu=_gpu(x.device)))


@functools.cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16 bytes: a copy if it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


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
    K = x.shape[-1]
    rows = _aligned(x).view(-1, K)
    M = rows.shape[0]
    outputs = [x.new_empty((*x.shape[:-1], packed.shape[0])) for packed in T_packed]
    if M == 0:
        return outputs
    layers = layer_shapes(T_packed, E_mantissa, bias)
    arguments = [rows]
    for i, mantissa in enumerate(E_mantissa):
        arguments += [_aligned(T_packed[i]), _aligned(E[i])]
        if mantissa is not None:
            arguments.append(_aligned(mantissa.expand(E[i].shape)))
        arguments += [tensor for tensor in (bias[i], bias_exponent[i]) if tensor is not None]
        arguments += status[i : i + 1]
    program = program_for(M, layers, K, group_size, x.dtype, guarded=bool(status), gpu=_gpu(x.device))
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(x.device):
        build.start(program).result()(*arguments, *(y.view(M, -1) for y in outputs))
    return outputs
