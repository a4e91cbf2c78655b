"""Scales of weights that are ternary already: an integer mantissa times a power of two, and nothing is rounded."""

import torch
from torch import Tensor

from ternarize.errors import ConversionError
from ternarize.packing import E_MAX, E_MIN

#: What holds the significant bits of a scale of this dtype: 8, 11 and 24.
MANTISSA_DTYPES = {torch.bfloat16: torch.uint8, torch.float16: torch.int16, torch.float32: torch.int32}

_FLOAT32_BITS = 24


def other_magnitudes(magnitude: Tensor, scale: Tensor) -> Tensor:
    """Which of the magnitudes [R, G, s] are neither 0 nor that of their group, [R, G]: bool [R, G, s]."""
    return (magnitude != 0) & (magnitude != scale[..., None])


def exact_scales(grouped: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The one magnitude of each group, as an odd mantissa and an exponent.

    Args:
        grouped: float32 [R, G, s].
        name: of the weight, for messages.

    Returns:
        int32 exponents and int32 mantissas, [R, G]: the magnitude is mantissa · 2^exponent, 0 · 2^0 if all is zero.

    Raises:
        ConversionError: if a group has two magnitudes beside 0, or one that is too small for an exponent.
    """
    magnitude = grouped.abs()
    scale = magnitude.amax(-1)
    others = other_magnitudes(magnitude, scale)
    if others.any():
        place = tuple(others.nonzero()[0].tolist())
        raise ConversionError(
            f"{name} is not ternary: a group of {grouped.shape[-1]} weights has the magnitudes {magnitude[place]:g} "
            f"and {scale[place[:2]]:g}. init='exact' takes groups of -s, 0 and s: try a smaller group size, exclude "
            "what is dense, or round with init='least_squares'"
        )
    fraction, exponent = torch.frexp(scale)
    mantissa = torch.ldexp(fraction, torch.tensor(_FLOAT32_BITS)).to(torch.int32)
    # A power of two, or 0: log2 of a float is exact there.
    lowest = (mantissa & -mantissa).clamp_min(1)
    exponent = exponent - _FLOAT32_BITS * (mantissa != 0) + torch.log2(lowest.to(torch.float32)).to(torch.int32)
    if ((exponent < E_MIN) | (exponent > E_MAX)).any():
        raise ConversionError(f"{name} has a scale of {scale[scale > 0].min():g}: 2^{E_MIN} is the smallest exponent")
    return exponent, mantissa // lowest
