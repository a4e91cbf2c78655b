"""Which tensors of a checkpoint become ternary: decided from names, shapes and the model class, before any is read."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ternarize.candidates import DenseLayer, Skip, find_dense_layers
from ternarize.checkpoint.format import PackedLayer
from ternarize.checkpoint.packed import PackedCheckpoint
from ternarize.checkpoint.source import Source, TensorInfo
from ternarize.checkpoint.transformers_model import empty_model, is_conv1d, model_names
from ternarize.config import TernaryConfig
from ternarize.errors import CheckpointError
from ternarize.packing import groups_per_row
from ternarize.quantize.exact import MANTISSA_DTYPES
from ternarize.skip import skip_reason

#: Dtypes of dense weights; the 8-bit floats need scales that no format here says where to find.
CONVERTIBLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A weight matrix of the source and what becomes of it."""

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
    knows the model, the rule is that of `ternarize.ternarize` on its modules; else every matrix ``<name>.weight``
    counts as the weight of a linear layer, unless its name says otherwise (`ternarize.skip`).

    Args:
        source: the checkpoint.
        config: of the new layers.
        include: as in `ternarize.ternarize`.
        exclude: likewise.
    """
    if isinstance(source, PackedCheckpoint):
        return Plan("their T_packed", {name: name for name in source.tensors}, {}, dict(source.layers))
    model, identified_by = _model(source)
    if model is None:
        targets = {name: name for name in source.tensors}
    else:
        targets = model_names(model, source.tensors)
        modules = dict(model.named_modules())
        dense = _dense_layers(model, include, exclude)
    candidates = {}
    layers = {}
    sources = {target: name for name, target in targets.items()}
    for name, info in source.tensors.items():
        layer, _, kind = targets[name].rpartition(".")
        if kind != "weight" or len(info.shape) != 2 or not layer:
            continue
        transposed = False
        if 0 in info.shape:
            reason: str | None = "it is empty"
        elif info.dtype not in (CONVERTIBLE if config.init != "exact" else MANTISSA_DTYPES):
            reason = f"its dtype is {str(info.dtype).removeprefix('torch.')}"
        elif model is None:
            reason = skip_reason(layer, include, exclude)
        elif layer in dense:
            transposed = is_conv1d(dense[layer].module)
            skip = dense[layer].skip
            reason = None if skip is None else skip.reason
        elif layer in modules:
            reason = f"{type(modules[layer]).__name__}, not a linear layer"
        else:
            reason = f"no module of {type(model).__name__}"
        in_features, out_features = info.shape if transposed else reversed(info.shape)
        mantissa = _mantissa(config, in_features, out_features, info.dtype)
        packed = PackedLayer(config, in_features, out_features, f"{layer}.bias" in sources, mantissa)
        reason = reason or _obstacle(source, sources, layer, packed)
        candidates[name] = Candidate(layer, (out_features, in_features), transposed, reason)
        if reason is None:
            layers[layer] = packed
    return Plan(identified_by, targets, candidates, layers)


def _mantissa(config: TernaryConfig, in_features: int, out_features: int, dtype: torch.dtype) -> TensorInfo | None:
    """E_mantissa of a layer, if it gets one."""
    if config.init != "exact" or dtype not in MANTISSA_DTYPES:
        return None
    return TensorInfo((out_features, groups_per_row(in_features, config.group_size)), MANTISSA_DTYPES[dtype])


def _obstacle(source: Source, sources: Mapping[str, str], name: str, layer: PackedLayer) -> str | None:
    """What beside the weight keeps a layer dense: a bias that is none, or tensors by the names it would write."""
    if layer.bias:
        bias = source.tensors[sources[f"{name}.bias"]]
        if bias.shape != (layer.out_features,) or bias.dtype not in CONVERTIBLE:
            return f"its bias is {bias}"
    taken = sources.keys() & layer.tensors(name).keys() - {f"{name}.bias"}
    return f"the source has a tensor {min(taken)!r} already" if taken else None


def _model(source: Source) -> tuple[nn.Module | None, str]:
    if source.config is None:
        return None, "names and shapes (the source has no config.json)"
    try:
        model = empty_model(source.config)
    except CheckpointError as error:
        return None, f"names and shapes ({error})"
    return model, f"the modules of {type(model).__name__}"


def _dense_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, DenseLayer]:
    """Linear layers by every name; what two of them share stays dense, because the file holds it under one name."""
    layers = find_dense_layers(model, include, exclude, None)
    first: dict[int, DenseLayer] = {}
    for layer in layers:
        other = first.setdefault(id(layer.parameter), layer)
        if other is not layer:
            layer.skip = layer.skip or Skip(f"shares its weight with {other.name!r}", chosen=False)
            other.skip = other.skip or Skip(f"shares its weight with {layer.name!r}", chosen=False)
    return {name: layer for layer in layers for name in layer.names}
