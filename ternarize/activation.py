"""Activations in int8, one scale a token (BitNet b1.58, arXiv 2402.17764): plain tensor code, which graphs inline."""

import torch
from torch import Tensor

#: The least magnitude that a token is scaled by: zeros stay zeros.
_LEAST_MAGNITUDE = 1e-5

#: What the largest magnitude becomes before it is rounded: 127, and so much more that what is halfway between two
#: integers gets above that however a kernel rounds a quotient, and no other value of 16 bits does. In bfloat16 one
#: value in a thousand is half the largest, 63.5.
_TOP = 127 + 2**-13

#: A float32 of less than 2^22 plus this has an integer in its last bits, rounded to nearest, even if halfway.
_ROUNDING = 1.5 * 2**23
_ROUNDING_BITS = 0x4B400000


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x to int8 times a scale: the token's largest magnitude becomes 127.

    To nearest, away from zero if halfway: of bfloat16 and float16 the same integers on every device. A token with NaN
    or Inf gets a scale that is not finite, and so has every output of that token.

    Args:
        x: floating [..., K].

    Returns:
        q int8 [..., K] and scale float32 [..., 1], with x close to q · scale.
    """
    # Written for the kernels that Inductor makes of it, twice as fast so on an H200 (docs/figures.md): bits of
    # magnitudes have the order of their values, and NaN is the largest; and conversions from and to floats are slow.
    x = x.to(torch.float32)
    magnitude = x.abs().view(torch.int32).amax(-1, keepdim=True).view(torch.float32).clamp(min=_LEAST_MAGNITUDE)
    q = ((x * (_TOP / magnitude) + _ROUNDING).view(torch.int32) - _ROUNDING_BITS).to(torch.int8)
    return q, magnitude / 127


def dequantize_activation(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_activation` made, as floating [..., K]: q · scale, formed in float32 (float64 if asked for)."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return (q.to(accumulate) * scale.to(accumulate)).to(dtype)
