"""What is done in a step with the gradients and activations that backward kept, under ``apply="hooks"``."""

import math

import torch
from torch import Tensor

from ternarize.backends.torch.update import NONFINITE_GRADIENT
from ternarize.layer import STAGE, TernaryLinear

_FLOAT32_MAX = torch.finfo(torch.float32).max


def findings(layer: TernaryLinear) -> Tensor:
    """The status of a layer with the gradient bit, if what it keeps could make a gradient that is not finite: int32 [].

    The gradient itself is formed only after every layer was found finite. What is known before is a limit: no entry of
    grad_yᵀ · x is larger than the sum over all tokens of the largest |grad_y| times the largest |x|.
    """
    limit = torch.zeros((), dtype=torch.float64, device=layer.status.device)
    for grad_2d, x_2d in zip(*layer.hooks(), strict=True):
        if grad_2d.numel() and x_2d.numel():
            largest_grad, largest_x = (torch.linalg.vector_norm(t, math.inf).double() for t in (grad_2d, x_2d))
            limit += largest_grad * largest_x * len(grad_2d)
    # A comparison with NaN is false.
    return layer.status[0] | (~(limit <= _FLOAT32_MAX)).to(torch.int32) * NONFINITE_GRADIENT


def stage_hooks(layer: TernaryLinear) -> None:
    """Stage the tokens of all backwards as one micro-batch, and drop them."""
    grads, inputs = layer.hooks()
    layer.release_hooks()
    layer.allocate_stage()
    # It counted backwards.
    layer.status[1:].zero_()
    if not grads:
        return
    statistics = ([] if vector is None else [vector] for vector in (layer.row_log2, layer.col_log2))
    stage = ([] if tensor is None else [tensor] for tensor in (getattr(layer, name) for name in STAGE))
    torch.ops.ternarize.update_stage(
        [torch.cat(grads)],
        torch.cat(inputs),
        [layer.T_packed],
        *statistics,
        [layer.rng],
        *stage,
        [layer.status],
        layer.group_size,
        layer.rule,
    )
