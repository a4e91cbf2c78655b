"""Activations in int8, one scale a token (BitNet b1.58, arXiv 2402.17764): plain tensor code, which graphs inline."""

import torch
from torch import Tensor

#: The least magnitude that a token is scaled by: zeros stay zeros.
_LEAST_MAGNITUDE = 1e-5


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x to int8 times a scale: the token's largest magnitude becomes 127.

    A token with NaN or Inf gets a scale that is not finite, and so has every output of that token.

    Args:
        x: floating [..., K].

    Returns:
        q int8 [..., K] and scale float32 [..., 1], with x close to q · scale.
    """
    x = x.to(torch.float32)
    magnitude = x.abs().amax(-1, keepdim=True).clamp(min=_LEAST_MAGNITUDE)
    q = (x * (127 / magnitude)).round().clamp(-128, 127).to(torch.int8)
    return q, magnitude / 127


def dequantize_activation(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_activation` made, as floating [..., K]: q · scale, formed in float32 (float64 if asked for)."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return (q.to(accumulate) * scale.to(accumulate)).to(dtype)
