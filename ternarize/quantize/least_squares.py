"""Exponents with the smallest squared error of each group."""

import torch
from torch import Tensor

from ternarize.packing import E_MAX, E_MIN, exp2_exact

#: Candidates a group: the smallest 2^E at which nothing is cut off, and that one halved up to five times. Cutting the
#: largest weight to a 32nd of itself pays only in groups of more than about a thousand weights with one outlier.
CANDIDATES = 6


def least_squares_exponents(grouped: Tensor, largest: int) -> Tensor:
    """For each group the exponent among `CANDIDATES` whose rounded weights are nearest, not yet clamped.

    No coarser scale can be better than the coarsest candidate: its levels are a superset of theirs within the group's
    range.

    Args:
        grouped: float32 [R, G, s].
        largest: the largest level, 1, 4 or 13.

    Returns:
        float32 [R, G].
    """
    coarsest = torch.ceil(torch.log2(grouped.abs().amax(-1) / largest)).clamp(E_MIN, E_MAX)
    # In units of the coarsest scale squares neither overflow nor vanish, whatever the magnitude of the weights.
    units = grouped / exp2_exact(coarsest)[..., None]
    errors = []
    for halvings in range(CANDIDATES):
        position = units * 2.0**halvings
        remainder = torch.round(position).clamp_(-largest, largest).sub_(position)
        errors.append(remainder.square_().sum(-1) * 4.0**-halvings)
    return coarsest - torch.stack(errors).argmin(0)
