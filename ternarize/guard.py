"""What happens after a kernel wrote NaN or Inf from finite input: whose it was, and what runs from then on.

Layers register their status tensor here, so that a compiled graph, which knows tensors only, can find the layer.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ternarize.errors import NonFiniteError

if TYPE_CHECKING:
    from ternarize.layer import TernaryLinear

_layers: Any = WeakTensorKeyDictionary()


def register(layer: "TernaryLinear") -> None:
    """Remember whose ``layer.status`` is; called whenever a layer gets a new one."""
    _layers[layer.status] = weakref.ref(layer)


def layer_of(status: Tensor) -> "TernaryLinear | None":
    """The layer that a status tensor belongs to, if it is still alive."""
    reference = _layers.get(status)
    return None if reference is None else reference()


def take_off_tilelang(layers: Sequence["TernaryLinear"], *, forced: bool, shape: Sequence[int] | None) -> None:
    """Switch layers whose TileLang kernel wrote a non-finite value to the next backend, for the rest of the process.

    The switch is an attribute that Dynamo guards on: the next call of the compiled model recompiles without it.

    Args:
        layers: the layers.
        forced: whether TileLang was asked for by name.
        shape: of the input, for the message; None if it was in an earlier call, whose result stands.

    Raises:
        NonFiniteError: if ``forced``.
    """
    names = ", ".join(f"{layer.name or 'unnamed'} [{layer.out_features}x{layer.in_features}]" for layer in layers)
    when = f"of shape {list(shape)}" if shape is not None else "in an earlier call, which wrote to its inputs"
    what = f"TileLang wrote NaN or Inf from finite input {when}: {names}"
    if forced:
        raise NonFiniteError(f"{what}: use kernels=auto, which falls back, or kernels=triton")
    for layer in layers:
        layer.tilelang = False
    warnings.warn(f"{what}: Triton or torch runs there from now on", RuntimeWarning, stacklevel=2)
