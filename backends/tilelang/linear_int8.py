"""y = (q · Wᵀ) · scale + bias on Hopper's int8 tensor cores, from the same packed trits as `linear`."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ternarize.backends.tilelang import linear
from ternarize.backends.tilelang.host import launch

program_for = functools.partial(linear.program_for, activation="int8")


def linear_int8(
    q: Tensor,
    scale: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    E_mantissa: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    bias_exponent: Sequence[Tensor | None],
    status: Sequence[Tensor],
    group_size: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Linear layers that share their quantised input; see `ternarize.ops` for shapes, `verify` for what is accepted.

    Sums are exact in int32, or in float32 over groups for a few tokens; rounds once, to ``dtype``.
    """
    return launch(program_for, [q, scale], T_packed, E, E_mantissa, bias, bias_exponent, status, group_size, dtype)
