"""What `linear` and `linear_int8` share on the host: from the tensors of a call to its kernel, and its launch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.backends.tilelang import build
from ternarize.backends.tilelang.layers import LayerShape


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


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Under which name measured tiles are kept for a GPU (`ternarize.backends.tilelang.tuned`)."""
    return torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=4096)
def _kernel(program_for: Callable[..., build.Program], device: torch.device, *call: Any, guarded: bool) -> build.Kernel:
    """The kernel of a call, by the arguments of its ``program_for``: to form the program each time takes longer."""
    return build.start(program_for(*call, guarded=guarded, gpu=gpu_name(device))).result()


def launch(
    program_for: Callable[..., build.Program],
    inputs: Sequence[Tensor],
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    status: Sequence[Tensor],
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Run the kernel of a call.

    Args:
        program_for: of the op, for example `ternarize.backends.tilelang.linear.program_for`.
        inputs: x [..., K], or q and its scale [..., 1].
        T_packed: of each layer, and so on, as in `ternarize.ops`.
        E: likewise.
        E_mantissa: likewise.
        bias: likewise.
        bias_exponent: likewise.
        status: of each layer, or empty: then nothing is reported.
        group_size: of all layers.
        dtype: of the results.

    Returns:
        [..., N] of each layer.
    """
    x, *scale = inputs
    K = x.shape[-1]
    outputs = [x.new_empty((*x.shape[:-1], packed.shape[-2]), dtype=dtype) for packed in T_packed]
    rows = aligned(x).view(-1, K)
    M = rows.shape[0]
    if M == 0:
        return outputs
    arguments = [rows, *(each.contiguous().view(-1) for each in scale)]
    for i, mantissa in enumerate(E_mantissa):
        arguments += [aligned(T_packed[i]), aligned(E[i])]
        if mantissa is not None:
            arguments.append(aligned(mantissa.expand(E[i].shape)))
        arguments += [tensor for tensor in (bias[i], bias_exponent[i]) if tensor is not None]
        arguments += status[i : i + 1]
    layers = layer_shapes(T_packed, E_mantissa, bias)
    kernel = _kernel(program_for, x.device, M, layers, K, group_size, dtype, guarded=bool(status))
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(x.device):
        kernel(*arguments, *(y.view(M, -1) for y in outputs))
    return outputs


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16 bytes: a copy if it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
