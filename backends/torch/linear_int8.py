"""y = (q · Wᵀ) · scale + bias with int8 activations: the definition of the op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.activation import dequantize_activation
from ternarize.backends.torch.linear import linear


def linear_int8(
    q: Tensor,
    scale: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Linear layers that share their quantised input; see `ternarize.ops` for shapes.

    The scale goes onto q, so that no sum leaves the range of float32 that the result does not leave. Accumulates in
    float32 (float64 for a float64 result) and rounds once, to ``dtype``.
    """
    x = dequantize_activation(q, scale, torch.float64 if dtype == torch.float64 else torch.float32)
    return [y.to(dtype) for y in linear(x, T_packed, E, E_mantissa, bias, bias_exponent, group_size)]
