"""Gradients and activations that backward keeps for the optimizer's step, under ``apply="hooks"``.

Layers register their ``rng``, so that the op that runs in backward, which is given tensors only, can find the layer.
"""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ternarize.errors import TernarizeError

if TYPE_CHECKING:
    from ternarize.layer import TernaryLinear

#: By address: a compiled graph may hand on another tensor object for the same memory.
_layers: "weakref.WeakValueDictionary[tuple[torch.device, int], TernaryLinear]" = weakref.WeakValueDictionary()


def register(layer: "TernaryLinear") -> None:
    """Remember whose ``layer.rng`` is; called whenever a layer gets a new one."""
    _layers[layer.rng.device, layer.rng.data_ptr()] = layer


def keep(rng: Tensor, grad_2d: Tensor, x_2d: Tensor) -> None:
    """Add the tokens of one backward to what the layer with this ``rng`` keeps.

    Args:
        rng: of the layer, the tensor itself.
        grad_2d: [M, N].
        x_2d: [M, K].

    Raises:
        TernarizeError: if no layer has this tensor.
    """
    layer = _layers.get((rng.device, rng.data_ptr()))
    if layer is None or layer.rng.data_ptr() != rng.data_ptr():
        raise TernarizeError(
            "backward reached a ternary layer that is no more, or a copy of its tensors: keep the model alive until "
            'backward is done, or use apply="step"'
        )
    layer.keep_hooks(grad_2d, x_2d)
