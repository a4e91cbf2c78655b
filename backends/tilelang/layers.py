"""The layers of a call, which share x and run in one launch, as the TileLang programs see them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import tilelang.language as T
import torch
from tilelang import tvm

from ternarize.config import Activation

Dtype = Literal["bfloat16", "float16"]

#: Bytes of an element of E_mantissa, by its dtype.
MANTISSA_BYTES = {None: 0, "uint8": 1, "int16": 2, "int32": 4}


def dtype_name(dtype: torch.dtype) -> Dtype:
    """Of bfloat16 or float16, as programs name it."""
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a program must know of one layer of a call."""

    N: int
    """out_features."""
    planes: int
    """Trit planes: 1, 2 or 3."""
    mantissa: str | None
    """None, or the dtype of E_mantissa: "uint8", "int16" or "int32"."""
    bias: bool


def pointer(buffer: Any, access: Literal["r", "w", "rw"]) -> Any:
    """The start of a buffer, for a device function; a null pointer for None."""
    return 0 if buffer is None else T.access_ptr(buffer[(0,) * len(buffer.shape)], access)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerBuffers:
    """The tensors of one layer, as TileLang buffers; None for those that it does not have."""

    T_packed: Any
    """uint8 [N, B], or [P, N, B] of more than one plane."""
    E: Any
    """int8 [N, G]."""
    E_mantissa: Any
    """[N, G]."""
    bias: Any
    """int32 [N]."""
    bias_exponent: Any
    """int8 [1]."""
    status: Any
    """int32 [2], of a guarded call."""
    y: Any
    """[M, N], written."""

    def pointers(self) -> list[Any]:
        """All but T_packed, in their order: the last arguments of ``layer`` in both kernels that are CUDA C++."""
        read = (self.E, self.E_mantissa, self.bias, self.bias_exponent)
        return [*(pointer(buffer, "r") for buffer in read), pointer(self.status, "rw"), pointer(self.y, "w")]


def call_arguments(
    layers: Sequence[LayerShape], K: int, g: int, dtype: Dtype, activation: Activation, *, guarded: bool
) -> tuple[Any, Any, list[LayerBuffers]]:
    """Declare the arguments of the prim_func that is being built; to be called first in its body.

    The order is that of the kernel's call: x, and its scale if it is int8; T_packed, E, E_mantissa, bias, bias_exponent
    and status of each layer, as far as it has them; then the y of each.

    Args:
        layers: of the call.
        K: in_features.
        g: weights a scale group, at most K.
        dtype: of y, and of x unless that is int8.
        activation: int8 for x in int8, with a scale for each token.
        guarded: whether there is a status for each layer.

    Returns:
        x [M, K], whose M is known at the call; scale, float32 [M], or None; and the buffers of each layer.
    """
    M = T.dynamic("M")
    x = argument("x", (M, K), "int8" if activation == "int8" else dtype)
    scale = argument("scale", (M,), "float32") if activation == "int8" else None
    return x, scale, _layer_arguments(layers, M, K, g, dtype, guarded=guarded)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedArguments:
    """What the decode kernel takes for what it does besides; 0 and None where it can do nothing."""

    norm_weight: Any = None
    """[K]."""
    residual: Any = None
    """[M, N], of a call of one layer."""
    norm_eps: Any = 0
    """float32."""
    what: Any = 0
    """int32: bits of `ternarize.backends.tilelang.linear_decode.FUSED`."""


def fused_arguments(layers: Sequence[LayerShape], x: Any, dtype: Dtype) -> FusedArguments:
    """Declare the arguments after those of `call_arguments`, in the order of the fields.

    Args:
        layers: of the call.
        x: [M, K].
        dtype: of x.
    """
    M, K = x.shape
    return FusedArguments(
        norm_weight=argument("norm_weight", (K,), dtype),
        residual=argument("residual", (M, layers[0].N), dtype) if len(layers) == 1 else None,
        norm_eps=tvm.script.ir_builder.tirx.arg("norm_eps", T.float32()),
        what=tvm.script.ir_builder.tirx.arg("what", T.int32()),
    )


def argument(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """Declare one argument of the prim_func that is being built: a contiguous tensor."""
    return tvm.script.ir_builder.tirx.arg(name, T.Tensor(shape, dtype))


def _layer_arguments(
    layers: Sequence[LayerShape], M: Any, K: int, g: int, dtype: Dtype, *, guarded: bool
) -> list[LayerBuffers]:
    B, G = -(-K // 4), -(-K // g)
    inputs = []
    for i, layer in enumerate(layers):
        planes = (layer.planes,) if layer.planes > 1 else ()
        inputs.append(
            {
                "T_packed": argument(f"T_packed_{i}", (*planes, layer.N, B), "uint8"),
                "E": argument(f"E_{i}", (layer.N, G), "int8"),
                "E_mantissa": argument(f"E_mantissa_{i}", (layer.N, G), layer.mantissa) if layer.mantissa else None,
                "bias": argument(f"bias_{i}", (layer.N,), "int32") if layer.bias else None,
                "bias_exponent": argument(f"bias_exponent_{i}", (1,), "int8") if layer.bias else None,
                "status": argument(f"status_{i}", (2,), "int32") if guarded else None,
            }
        )
    outputs = [argument(f"y_{i}", (M, layer.N), dtype) for i, layer in enumerate(layers)]
    return [LayerBuffers(**buffers, y=y) for buffers, y in zip(inputs, outputs, strict=True)]
