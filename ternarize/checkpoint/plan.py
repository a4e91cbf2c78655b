"""Which tensors of a checkpoint become ternary: decided from names, shapes and the model class, before any is read."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from ternarize.checkpoint.format import PackedLayer
from ternarize.checkpoint.packed import PackedCheckpoint
from ternarize.checkpoint.source import Source, TensorInfo
from ternarize.checkpoint.transformers_model import empty_model, is_conv1d, is_linear, model_names, tied_names
from ternarize.config import TernaryConfig
from ternarize.errors import CheckpointError
from ternarize.skip import skip_reason


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A weight matrix of the source and what becomes of it."""

    source: str
    """Name of the weight in the source."""

    name: str
    """Qualified name of its layer in the model."""

    shape: tuple[int, int]
    """(N, K)."""

    transposed: bool
    """Whether the source holds it as [K, N] (transformers' Conv1D)."""

    reason: str | None
    """Why it stays dense, or None if it is converted."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion does with every tensor."""

    identified_by: str
    """How linear layers were told from other matrices, for people."""

    targets: dict[str, str]
    """Name of each source tensor to its name in the model."""

    candidates: dict[str, Candidate]
    """Matrices by their source name."""

    layers: dict[str, PackedLayer]
    """Layers that are ternary in the result, those that already were included."""


def make_plan(
    source: Source, config: TernaryConfig, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> Plan:
    """Decide for every matrix of the source whether it becomes a ternary layer, and if not, why.

    A checkpoint alone does not tell a linear layer from an embedding. Where config.json is there and transformers
    knows the model, its class does; else every matrix ``<name>.weight`` counts as linear unless its name says
    otherwise (`ternarize.skip`).

    Args:
        source: the checkpoint.
        config: of the new layers.
        include: see `ternarize.skip.skip_reason`.
        exclude: likewise.
    """
    if isinstance(source, PackedCheckpoint):
        targets = {name: name for name in source.tensors}
        return Plan("already ternary, copied as it is", targets, {}, dict(source.layers))
    model, identified_by = _model(source)
    targets = model_names(model, source.tensors) if model is not None else {name: name for name in source.tensors}
    judge = _Judge(model)
    candidates = {}
    layers = {}
    known = set(targets.values())
    for name, info in source.tensors.items():
        layer, _, kind = targets[name].rpartition(".")
        if kind != "weight" or len(info.shape) != 2 or not layer:
            continue
        reason = judge.dense_reason(layer, info) or skip_reason(layer, include, exclude)
        transposed = judge.transposed(layer)
        rows, columns = info.shape
        shape = (columns, rows) if transposed else (rows, columns)
        candidates[name] = Candidate(name, layer, shape, transposed, reason)
        if reason is None:
            layers[layer] = PackedLayer(config, shape[1], shape[0], bias=f"{layer}.bias" in known)
    return Plan(identified_by, targets, candidates, layers)


def _model(source: Source) -> tuple[nn.Module | None, str]:
    if source.config is None:
        return None, "names and shapes: the source has no config.json"
    try:
        model = empty_model(source.config)
    except CheckpointError as error:
        return None, f"names and shapes: {error}"
    return model, f"the modules of {type(model).__name__}"


class _Judge:
    """Tells linear layers from other matrices, by the model where there is one."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = type(model).__name__
        self._modules = None if model is None else dict(model.named_modules())
        self._tied = {} if model is None else tied_names(model)

    def dense_reason(self, layer: str, info: TensorInfo) -> str | None:
        """Why the matrix is no weight of a linear layer of its own, or None if it is."""
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            return f"its dtype is {str(info.dtype).removeprefix('torch.')}"
        if self._modules is None:
            return None
        module = self._modules.get(layer)
        if module is None:
            return f"no module of {self._model}"
        if not is_linear(module):
            return f"{type(module).__name__}, not a linear layer"
        other = self._tied.get(f"{layer}.weight")
        return None if other is None else f"tied to {other}"

    def transposed(self, layer: str) -> bool:
        """Whether the layer's weight is [K, N]."""
        module = None if self._modules is None else self._modules.get(layer)
        return module is not None and is_conv1d(module)
