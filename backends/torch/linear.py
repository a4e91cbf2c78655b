"""y = x · Wᵀ + bias with W = T · 2^E, dense and in float32: the definition of the op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.packing import dequantize


def dense_bias(bias: Tensor, bias_exponent: Tensor) -> Tensor:
    """float32 [N] from int32 [N] and its int8 [1] exponent."""
    return torch.ldexp(bias.to(torch.float64), bias_exponent.to(torch.int64)).to(torch.float32)


def linear(
    x: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    group_size: int,
) -> list[Tensor]:
    """Linear layers that share their input; see `ternarize.ops` for shapes.

    Accumulates in float32 (float64 for float64 input) and rounds once, to the dtype of x.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs = []
    for i, packed in enumerate(T_packed):
        weight = dequantize(packed, E[i], E_mantissa[i], x.shape[-1], group_size, accumulate)
        y = torch.nn.functional.linear(x.to(accumulate), weight)
        b, exponent = bias[i], bias_exponent[i]
        if b is not None and exponent is not None:
            y += dense_bias(b, exponent)
        outputs.append(y.to(x.dtype))
    return outputs
