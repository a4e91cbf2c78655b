"""Dense weights to integer levels and exponents: rounding here, one file for each choice of exponents."""

import dataclasses
import math

import torch
from torch import Tensor

from ternarize.backends.torch.update import FORMS
from ternarize.config import TernaryConfig
from ternarize.errors import ConversionError, ShapeError
from ternarize.packing import E_MAX, E_MIN, expand_groups, group_scale, groups_per_row, largest_level, row_strips
from ternarize.quantize.absmean import absmean_exponents
from ternarize.quantize.exact import MANTISSA_DTYPES, exact_scales, other_magnitudes
from ternarize.quantize.least_squares import least_squares_exponents


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A dense weight as integers; `ternarize.packing` has the dimension key."""

    levels: Tensor
    """int8 [N, K], of magnitude up to (3^P - 1) / 2."""

    E: Tensor
    """int8 [N, G]: the weight is about levels · 2^E, or exactly that times E_mantissa."""

    T_accum: Tensor | None
    """int8 [N, K], where the accumulators of a trainable layer start; None for other layers."""

    E_mantissa: Tensor | None
    """uint8, int16 or int32 [N, G], by the dtype of the weight; None unless ``init="exact"``."""


def quantize_weight(
    weight: Tensor, config: TernaryConfig, *, trainable: bool = True, name: str = "weight"
) -> Quantized:
    """Round a dense weight to levels times a power of two a group.

    With one plane and ``init="absmean"``, 2^E is the power of two nearest to the mean magnitude of the group (BitNet
    b1.58, Ma et al., 2024, arXiv:2402.17764, section 2, with the scale rounded); otherwise it is the one with the
    smallest squared error. What rounding to a trit leaves goes into T_accum, so that a trit and its accumulator are one
    position that training moves continuously. A group of zeros gets the exponent that nn.Linear's own initialisation
    would have given it: training can fill it. With ``init="exact"`` the weight is ternary already, and nothing is
    rounded (`ternarize.quantize.exact`).

    Works on strips of rows: beside the result, scratch is bounded whatever the size of the weight.

    Args:
        weight: floating [N, K], on any device that holds data.
        config: group size, planes, init, and the rule and form that T_accum is for.
        trainable: whether to return T_accum, which only layers of one plane have.
        name: of the weight, for messages.

    Returns:
        Levels, exponents within [-126, 127] with levels · 2^E finite in float32, the accumulators and mantissas.

    Raises:
        ConversionError: if the weight holds NaN, Inf or numbers beyond float32, or is not ternary where it has to be.
        ShapeError: if the weight is no floating-point matrix.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ShapeError(f"{name} is {weight.dtype} {list(weight.shape)}: only floating-point matrices can be ternary")
    weight = weight.detach()
    rows, in_features = weight.shape
    groups = groups_per_row(in_features, config.group_size)
    levels = weight.new_empty((rows, in_features), dtype=torch.int8)
    E = weight.new_empty((rows, groups), dtype=torch.int8)
    T_accum = torch.zeros_like(levels) if trainable and config.planes == 1 else None
    E_mantissa = torch.ones_like(E, dtype=mantissa_dtype(weight.dtype, name)) if config.init == "exact" else None
    for strip in row_strips(rows, in_features):
        grouped = _group(finite_float32(weight[strip], name), config.group_size)
        if E_mantissa is None:
            E[strip] = _exponents(grouped, in_features, config)
        else:
            exponents, mantissas = exact_scales(grouped, name)
            E[strip] = torch.where(mantissas > 0, exponents, _untrained_exponent(in_features))
            E_mantissa[strip] = mantissas.clamp_min(1).to(E_mantissa.dtype)
        position = grouped / group_scale(E[strip], None if E_mantissa is None else E_mantissa[strip])[..., None]
        largest = largest_level(config.planes)
        nearest = torch.round(position).clamp(-largest, largest)
        levels[strip] = _ungroup(nearest, in_features)
        if T_accum is not None and config.rule == "factored":
            T_accum[strip] = _ungroup(_remainder(position - nearest, config.accumulator), in_features)
    return Quantized(levels, E, T_accum, E_mantissa)


def mantissa_dtype(dtype: torch.dtype, name: str) -> torch.dtype:
    """Of the mantissas of scales of a dtype.

    Raises:
        ConversionError: for a dtype that has more bits than mantissas.
    """
    if dtype not in MANTISSA_DTYPES:
        known = ", ".join(str(each).removeprefix("torch.") for each in MANTISSA_DTYPES)
        raise ConversionError(f"{name} is {dtype}: init='exact' takes one of {known}")
    return MANTISSA_DTYPES[dtype]


def finite_float32(tensor: Tensor, name: str) -> Tensor:
    """A tensor in float32.

    Raises:
        ConversionError: if any number of it is not finite there.
    """
    converted = tensor.detach().to(torch.float32)
    if not torch.isfinite(converted).all():
        raise ConversionError(
            f"{name} holds NaN, Inf or numbers beyond float32: repair the checkpoint, or exclude this layer"
        )
    return converted


def require_finite(weight: Tensor, name: str) -> None:
    """Raise if `quantize_weight` or `quantize_bias` would for what is not finite; a weight without data passes."""
    if not weight.is_meta:
        for strip in row_strips(*weight.shape):
            finite_float32(weight[strip], name)


def require_ternary(weight: Tensor, group_size: int, name: str) -> None:
    """Raise if `quantize_weight` would with ``init="exact"``; a weight without data passes."""
    mantissa_dtype(weight.dtype, name)
    if not weight.is_meta:
        for strip in row_strips(*weight.shape):
            exact_scales(_group(finite_float32(weight[strip], name), group_size), name)


def is_ternary(weight: Tensor, group_size: int) -> bool:
    """Whether a floating [N, K] is -s, 0 and s in each of its groups already, and not all 0."""
    strips = (_group(weight[rows], group_size).abs() for rows in row_strips(*weight.shape))
    others = (other_magnitudes(magnitude, magnitude.amax(-1)) for magnitude in strips)
    return bool(weight.any()) and not any(bool(each.any()) for each in others)


def _group(strip: Tensor, group_size: int) -> Tensor:
    """[R, K] to [R, G, s]; the tail group is filled with zeros, which change no sum, maximum or error."""
    in_features = strip.shape[1]
    groups = groups_per_row(in_features, group_size)
    size = in_features if groups == 1 else group_size
    padded = torch.nn.functional.pad(strip, (0, groups * size - in_features))
    return padded.reshape(-1, groups, size)


def _ungroup(grouped: Tensor, in_features: int) -> Tensor:
    return grouped.flatten(1)[:, :in_features]


def _exponents(grouped: Tensor, in_features: int, config: TernaryConfig) -> Tensor:
    """int8 [R, G] for float32 [R, G, s]."""
    largest = largest_level(config.planes)
    if config.planes == 1 and config.init == "absmean":
        exponents = absmean_exponents(grouped, in_features)
    else:
        exponents = least_squares_exponents(grouped, largest)
    # largest · 2^E stays finite in float32: 13 · 2^124 is below 2^128, 13 · 2^125 is not.
    exponents = exponents.clamp(E_MIN, E_MAX - int(math.log2(largest)))
    return torch.where(grouped.any(-1), exponents, _untrained_exponent(in_features)).to(torch.int8)


def _untrained_exponent(in_features: int) -> int:
    """Of the mean magnitude of nn.Linear's uniform(-1/sqrt(K), 1/sqrt(K))."""
    return round(math.log2(0.5 / math.sqrt(in_features)))


def _remainder(remainder: Tensor, accumulator: str) -> Tensor:
    """What rounding left, in trits, as T_accum of the `factored` rule: 2 · theta a trit, momentum 0."""
    theta, _, _ = FORMS[accumulator]
    accum = torch.round(remainder * (2 * theta)).clamp(-theta, theta).to(torch.int8)
    return accum if accumulator == "int8" else accum & 15


def quantize_bias(bias: Tensor, *, name: str = "bias") -> tuple[Tensor, Tensor]:
    """Round a bias to integers times one power of two, the smallest with which the largest entry fits int32.

    Args:
        bias: floating [N].
        name: of the bias, for messages.

    Returns:
        int32 [N] and int8 [1]: the bias is integers · 2^exponent, to 2^-31 of the largest entry.

    Raises:
        ConversionError: if the bias holds NaN, Inf or numbers beyond float32.
    """
    exact = finite_float32(bias, name).to(torch.float64)
    # The largest entry is m · 2^e with m < 1, so m · 2^31 fits; float32 has too few bits to round it up to 2^31.
    _, e = torch.frexp(exact.abs().amax(0, keepdim=True))
    exponent = (e - 31).clamp(E_MIN, E_MAX)
    return torch.round(torch.ldexp(exact, -exponent)).to(torch.int32), exponent.to(torch.int8)


def relative_error(weight: Tensor, quantized: Quantized, group_size: int) -> float:
    """|W - W'|² / |W|², W' being levels times their scales; 0 for a weight of zeros.

    Args:
        weight: floating [N, K], finite in float32.
        quantized: its levels, exponents and mantissas.
        group_size: that it was quantised with.
    """
    in_features = weight.shape[1]
    error, total = weight.new_zeros(2, dtype=torch.float64)
    for strip in row_strips(*weight.shape):
        dense = weight[strip].detach().to(torch.float64)
        mantissa = None if quantized.E_mantissa is None else quantized.E_mantissa[strip]
        scale = group_scale(quantized.E[strip], mantissa).to(torch.float64)
        error += (dense - quantized.levels[strip] * expand_groups(scale, in_features, group_size)).square().sum()
        total += dense.square().sum()
    return (error / total).item() if total else 0.0
