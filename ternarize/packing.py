"""The packed format of ternary weights: 2 bits a trit, group-planar, and one exponent a group.

Dimension key, the same in every module, kernel and test:

    M  tokens (rows of x)           K  in_features       N  out_features
    g  group size, weights an exponent along K           G  groups a row, ceil(K / g)
    P  trit planes (1, 2 or 3)                           B  packed bytes a row, ceil(K / 4)

A trit t is stored as the 2-bit code ``t & 3``: 0 is 00, +1 is 01, -1 is 11, and 10 is illegal. Moved to the top two
bits of a lane the code already is a number: bf16 0x4000 and 0xC000 are +2 and -2, which is why kernels decode with a
shift and an AND. A group of s trits (s is g, or what is left of the row in the last group) takes q = ceil(s / 4) bytes;
byte c holds trits c, c + q, c + 2q and c + 3q, lowest bits first. Places past the end hold code 00.

Planes share one exponent: weight = 2^E · sum over p of 3^(P-1-p) · T_p, so P planes are 3^P uniform levels, integers of
magnitude up to (3^P - 1) / 2 = 1, 4 or 13.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ternarize.errors import ConfigError

#: Exponents that a float32 scale 2^E holds exactly as a normal number.
E_MIN, E_MAX = -126, 127

ROW = -1
"""``group_size`` that means one group a row."""

#: Bytes of float32 and int64 scratch that one strip of rows may take.
WORKSPACE_BYTES = 32 * 2**20
_SCRATCH_BYTES_PER_WEIGHT = 96


def check_group_size(group_size: int) -> None:
    """Raise ConfigError unless ``group_size`` is a positive multiple of 4, or -1 for whole rows."""
    if group_size != ROW and (group_size <= 0 or group_size % 4):
        raise ConfigError(
            f"group_size {group_size} is not a positive multiple of 4: use 32, 64, 128 or 256, or -1 for whole rows"
        )


def groups_per_row(in_features: int, group_size: int) -> int:
    """G: how many exponents a row of ``in_features`` weights has."""
    return 1 if group_size == ROW else -(-in_features // group_size)


def largest_level(planes: int) -> int:
    """The largest integer that ``planes`` trit planes can hold: 1, 4 or 13."""
    return int((3**planes - 1) // 2)


def row_strips(rows: int, in_features: int) -> Iterator[slice]:
    """Row ranges whose scratch stays within WORKSPACE_BYTES."""
    step = max(1, WORKSPACE_BYTES // (_SCRATCH_BYTES_PER_WEIGHT * max(1, in_features)))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _sections(in_features: int, group_size: int) -> list[tuple[int, int]]:
    """A row as at most two runs of equal groups: [(groups, trits a group), ...]. The second is the tail group."""
    if group_size == ROW or group_size >= in_features:
        return [(1, in_features)]
    whole, tail = divmod(in_features, group_size)
    return [(whole, group_size)] + ([(1, tail)] if tail else [])


def pack(T: Tensor, group_size: int) -> Tensor:
    """Pack trits to 2 bits each.

    Args:
        T: int8 [..., N, K], every value -1, 0 or 1.
        group_size: g, a positive multiple of 4, or -1 for whole rows; K need not be a multiple of it.

    Returns:
        uint8 [..., N, ceil(K / 4)].

    Raises:
        ConfigError: for a group size that is no positive multiple of 4.
    """
    check_group_size(group_size)
    parts = []
    sections = _sections(T.shape[-1], group_size)
    for section, (groups, size) in zip(T.split([n * s for n, s in sections], -1), sections, strict=True):
        q = -(-size // 4)
        codes = (section.unflatten(-1, (groups, size)) & 3).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, 4 * q - size)).unflatten(-1, (4, q))
        c0, c1, c2, c3 = codes.unbind(-2)
        parts.append((c0 | (c1 << 2) | (c2 << 4) | (c3 << 6)).flatten(-2))
    return torch.cat(parts, -1)


def unpack(T_packed: Tensor, in_features: int, group_size: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        T_packed: uint8 [..., N, ceil(K / 4)].
        in_features: K.
        group_size: the g that it was packed with.

    Returns:
        int8 [..., N, K]. The illegal code 10 reads as -2: see `has_illegal_code`.
    """
    sections = _sections(in_features, group_size)
    parts = []
    for packed, (groups, size) in zip(T_packed.split([n * -(-s // 4) for n, s in sections], -1), sections, strict=True):
        # Shifted left, the two bits are the sign bits of an int8, and the arithmetic shift right extends them. Bytes
        # are shifted where they lie and only then dealt out to their places: on a CPU that is the fast order.
        fields = [((packed << shift).view(torch.int8) >> 6).unflatten(-1, (groups, -1)) for shift in (6, 4, 2, 0)]
        parts.append(torch.cat(fields, -1)[..., :size].flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def has_illegal_code(T_packed: Tensor) -> bool:
    """Whether any of the four codes of any byte is 10 (synchronises with the device)."""
    return bool((((T_packed >> 1) & ~T_packed & 0x55) != 0).any())


def combine_planes(T: Tensor) -> Tensor:
    """Trit planes [P, N, K] int8, most significant first, to the integers [N, K] int8 that they stand for."""
    levels = T[0]
    for plane in T[1:]:
        levels = levels * 3 + plane
    return levels


def split_planes(levels: Tensor, planes: int) -> Tensor:
    """Integers of magnitude up to (3^P - 1) / 2, [N, K], to trit planes int8 [P, N, K] (balanced ternary digits)."""
    digits = []
    rest = levels.to(torch.int16)
    for _ in range(planes):
        digit = (rest + 1).remainder(3) - 1
        digits.append(digit.to(torch.int8))
        rest = (rest - digit).div(3, rounding_mode="trunc")
    return torch.stack(digits[::-1])


def exp2_exact(E: Tensor) -> Tensor:
    """2^E as float32, exact for E in [-126, 127], by placing the exponent bits (exp2 of a library may round)."""
    return ((E.to(torch.int32) + 127) << 23).view(torch.float32)


def group_scale(E: Tensor, E_mantissa: Tensor | None) -> Tensor:
    """float32 scales, shape of E: 2^E, times the integer mantissa if there is one."""
    scale = exp2_exact(E)
    return scale if E_mantissa is None else scale * E_mantissa.to(torch.float32)


def expand_groups(per_group: Tensor, in_features: int, group_size: int) -> Tensor:
    """[..., G] values of groups to [..., K] values of weights."""
    if per_group.shape[-1] == 1:
        return per_group.expand(*per_group.shape[:-1], in_features)
    return per_group.repeat_interleave(group_size, -1)[..., :in_features]


def dequantize(
    T_packed: Tensor, E: Tensor, E_mantissa: Tensor | None, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight.

    Args:
        T_packed: uint8 [N, B] or [P, N, B].
        E: int8 [N, G].
        E_mantissa: None, or integers that broadcast to [N, G].
        in_features: K.
        group_size: g, or -1 for whole rows.
        dtype: of the result; the product is formed in float32 (float64 if asked for) and rounded once.

    Returns:
        [N, K] of ``dtype``: T · 2^E, times the mantissa if any.
    """
    T = unpack(T_packed, in_features, group_size)
    levels = combine_planes(T) if T.dim() == 3 else T
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    scale = group_scale(E, E_mantissa).to(accumulate)
    return levels.to(accumulate).mul_(expand_groups(scale, in_features, group_size)).to(dtype)
