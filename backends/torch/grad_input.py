"""grad_x = sum over layers of grad_y · W, dense and in float32: the definition of the op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.packing import dequantize


def grad_input(
    grad_y: Sequence[Tensor],
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    in_features: int,
    group_size: int,
) -> Tensor:
    """Gradient of the shared input of some layers; see `ternarize.ops` for shapes.

    Accumulates in float32 (float64 for float64 gradients) and rounds once, to the dtype of grad_y.
    """
    accumulate = torch.float64 if grad_y[0].dtype == torch.float64 else torch.float32
    total = grad_y[0].new_zeros((*grad_y[0].shape[:-1], in_features), dtype=accumulate)
    for gradient, packed, exponents, mantissa in zip(grad_y, T_packed, E, E_mantissa, strict=True):
        total += gradient.to(accumulate) @ dequantize(packed, exponents, mantissa, in_features, group_size, accumulate)
    return total.to(grad_y[0].dtype)
