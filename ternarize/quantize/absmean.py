"""Exponents from the mean magnitude of each group."""

import torch
from torch import Tensor


def absmean_exponents(grouped: Tensor, in_features: int) -> Tensor:
    """round(log2(mean |W|)), not yet clamped; -inf for a group of zeros.

    Args:
        grouped: float32 [R, G, s], zeros past the end of the tail group.
        in_features: K, so that those zeros do not count.

    Returns:
        float64 [R, G].
    """
    groups, size = grouped.shape[1:]
    counts = torch.full((groups,), size, dtype=torch.float64, device=grouped.device)
    counts[-1] = in_features - (groups - 1) * size
    # Summed in float64: large weights do not overflow, and E does not hang on the order of the sum.
    return torch.round(torch.log2(grouped.abs().sum(-1, dtype=torch.float64) / counts))
