"""The calls of ternary layers that a model makes, found from its configuration and tensor headers, without weights."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ternarize.api import ternarize
from ternarize.checkpoint.format import QUANT_METHOD, PackedLayer
from ternarize.checkpoint.packed import PackedCheckpoint
from ternarize.checkpoint.pretrained import empty_pretrained
from ternarize.checkpoint.source import quant_method, read_config
from ternarize.checkpoint.transformers_model import empty_model
from ternarize.config import TernaryConfig
from ternarize.errors import CheckpointError
from ternarize.layer import TernaryLinear, ternary_layers

log = logging.getLogger(__name__)

#: Layers that share x: what a compiled graph runs as one call.
Call = tuple[PackedLayer, ...]


def calls_of_folder(path: Path, config: TernaryConfig) -> list[Call]:
    """The distinct calls of a checkpoint's model, in the order in which it makes them.

    Args:
        path: a folder that `ternarize convert` wrote, or a dense transformers folder. No weights are read.
        config: what the layers of a dense one would become.

    Raises:
        CheckpointError: if the folder is neither, or damaged.
    """
    content = read_config(path)
    if content is None:
        raise CheckpointError(f"{path} has no config.json: give a model's folder, or shapes such as 4096x4096")
    if quant_method(content) != QUANT_METHOD:
        return calls_of_model(ternarize(empty_model(content), config, trainable=False))
    checkpoint = PackedCheckpoint(path)
    if "model_type" not in content:
        log.warning("%s names no transformers model: its layers are taken for calls of one layer each", path)
        return _distinct([(layer,) for layer in checkpoint.layers.values()])
    return calls_of_model(empty_pretrained(checkpoint))


def calls_of_model(model: nn.Module) -> list[Call]:
    """The distinct calls of a transformers model, in the order in which its forward makes them.

    The model runs once on fake tensors. Layers that get the very same tensor are one call, as
    `ternarize.passes.fuse_shared_input` merges them. A model that cannot run so, such as one that routes tokens by
    their values, is taken to call each layer by itself.

    Args:
        model: with ternary layers; moved to the meta device, in bfloat16, which some kernels of PyTorch need.
    """
    # The inputs are kept: a tensor that is freed leaves its id to another.
    calls: dict[tuple[int, int, int, str], tuple[Tensor, list[PackedLayer]]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(layer, TernaryLinear):
            x = args[0]
            key = (id(x), x._version, layer.group_size, layer.activation)
            calls.setdefault(key, (x, []))[1].append(PackedLayer.of(layer))

    layers = [layer for _, layer in ternary_layers(model.to("meta", torch.bfloat16))]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            inputs = {name: value.to("meta") for name, value in model.dummy_inputs.items()}  # type: ignore[operator, union-attr]  # of PreTrainedModel
            model(**inputs)
    # Models raise whatever comes to them where values matter.
    except Exception as error:
        log.warning(
            "%s does not run without data (%s): its layers are taken for calls of one layer each",
            type(model).__name__,
            " ".join(str(error).split())[:200],
        )
        return _distinct([(PackedLayer.of(layer),) for layer in layers])
    finally:
        for hook in hooks:
            hook.remove()
    return _distinct([tuple(shared) for _, shared in calls.values()])


def calls_of_shapes(text: str, config: TernaryConfig) -> list[Call]:
    """Calls from shapes, out x in features, as in ``4096x4096,14336x4096+14336x4096``: ``+`` joins layers of one call.

    Args:
        text: the shapes.
        config: of every layer.

    Raises:
        ValueError: for anything else, with a message of one line.
    """
    return _distinct([_call(part, config) for part in text.split(",")])


def shape_of(text: str) -> tuple[int, int]:
    """N and K of a shape such as 4096x4096.

    Raises:
        ValueError: for anything else, with a message of one line.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ValueError(f"{text!r} is no shape: write out x in features, as in 14336x4096")
    return int(sides[0]), int(sides[1])


def _call(text: str, config: TernaryConfig) -> Call:
    layers = []
    for part in text.split("+"):
        N, K = shape_of(part)
        layers.append(PackedLayer(config, in_features=K, out_features=N))
    if len({layer.in_features for layer in layers}) > 1:
        raise ValueError(f"{text!r} joins layers of different in_features, which cannot share their input")
    return tuple(layers)


def _distinct(calls: Sequence[Call]) -> list[Call]:
    return list(dict.fromkeys(calls))
