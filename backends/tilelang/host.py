"""What `linear` and `linear_int8` share on the host: from the tensors of a call to its kernel, and its launch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.backends.tilelang import build
from ternarize.backends.tilelang.layers import LayerShape
from ternarize.backends.tilelang.linear_decode import FUSED, DecodeTile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """What a call of `linear` does besides, as `ternarize.ops` says; as it is, nothing."""

    rounds: bool = False
    norm_weight: Tensor | None = None
    norm_eps: float = 0.0
    residual: Tensor | None = None
    gated: bool = False

    @functools.cached_property
    def asked(self) -> tuple[str, ...]:
        """What it does: rounds, for which there are programs of their own, and the names of `FUSED`."""
        does = {
            "rounds": self.rounds,
            "norm": self.norm_weight is not None,
            "residual": self.residual is not None,
            "gated": self.gated,
        }
        return tuple(name for name, asked in does.items() if asked)

    def arguments(self, program: build.Program, x: Tensor, y: Sequence[Tensor]) -> list[Tensor | float | int]:
        """The last arguments of a program's kernel; none of one that can do nothing besides.

        Args:
            program: of the call.
            x: [M, K].
            y: [M, N] of each layer, for layers that are gated only the first.
        """
        if not isinstance(program.tile, DecodeTile) or program.activation != "float":
            return []
        # Where there is none, any tensor of its shape.
        weight = x[0] if self.norm_weight is None else aligned(self.norm_weight)
        residual = [y[0] if self.residual is None else self.residual.contiguous().view_as(y[0])]
        what = sum(bit for name, bit in FUSED.items() if name in self.asked)
        return [weight, *(residual if len(program.layers) == 1 else []), self.norm_eps, what]


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


#: Of a call that is `linear` alone.
NOTHING = Fused()


@functools.cache
def gpu_name(device: torch.device) -> str:
    """Under which name measured tiles are kept for a GPU (`ternarize.backends.tilelang.tuned`)."""
    return torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=4096)
def _kernel(
    program_for: Callable[..., build.Program], device: torch.device, *call: Any, guarded: bool, fused: tuple[str, ...]
) -> tuple[build.Program, build.Kernel]:
    """Of a call, by the arguments of its ``program_for``: to form the program each time takes longer."""
    program = program_for(*call, guarded=guarded, gpu=gpu_name(device), fused=fused)
    return program, build.start(program).result()


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
    fused: Fused = NOTHING,
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
        fused: what the kernel does besides.

    Returns:
        [..., N] of each layer; one of layers that are gated.

    Raises:
        ShapeError: if no kernel does besides what is asked for.
    """
    x, *scale = inputs
    K = x.shape[-1]
    results = T_packed[:1] if fused.gated else T_packed
    outputs = [x.new_empty((*x.shape[:-1], packed.shape[-2]), dtype=dtype) for packed in results]
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
    call = (M, layers, K, group_size, dtype)
    program, kernel = _kernel(program_for, x.device, *call, guarded=bool(status), fused=fused.asked)
    y = [output.view(M, -1) for output in outputs]
    # Of layers that are gated, the kernel writes to the first.
    of_layers = y * len(layers) if fused.gated else y
    # TileLang makes the device of its arguments the current one, and leaves it so.
    with torch.cuda.device(x.device):
        kernel(*arguments, *of_layers, *fused.arguments(program, rows, y))
    return outputs


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at an address that is a multiple of 16 bytes: a copy if it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
