"""Models for `ternarize bench decode`, `prefill` and `train`: Llamas of known shapes with random weights.

Speed does not depend on what the weights are, as long as they are not all alike, so nothing is downloaded or converted.
A model is built without memory and filled on its device, one that serves a layer at a time: no float copy of it is ever
made. One that trains starts from dense weights, as a user's does.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.api import freeze, ternarize
from ternarize.candidates import find_dense_layers
from ternarize.checkpoint.transformers_model import empty_model, tie_weights
from ternarize.config import TernaryConfig
from ternarize.errors import ConfigError
from ternarize.layer import TernaryLinear
from ternarize.packing import groups_per_row, largest_level

Config = dict[str, Any]

_LLAMA_3: Config = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}

#: The config.json of meta-llama/Llama-3.2-1B, Llama-3.1-8B, Llama-3.1-70B and HuggingFaceTB/SmolLM2-135M, as far as it
#: matters to speed: the scaled rotary frequencies of Llama 3.1 cost the same as plain ones.
SHAPES: dict[str, Config] = {
    "smol": _LLAMA_3
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}

#: Size of a product over the size of its input, roughly. With 1, the branches of 32 layers would bury what comes from
#: the embedding, and rounding errors would grow from layer to layer until a check says nothing.
GAIN = 0.5

#: Memory that a contender needs beside its weights: the CUDA context of its process, workspaces of cuBLAS, activations,
#: the cache of keys and values, for the check the head in float32 (4.2 GB of 70B). Enough for a few thousand tokens.
OVERHEAD_BYTES = 8 * 2**30


def model_config(model: str) -> Config:
    """The shape of a model by its name in `SHAPES`, or the content of a config.json.

    Raises:
        ConfigError: if it is neither.
    """
    if model in SHAPES:
        return SHAPES[model]
    try:
        config: Config = json.loads(Path(model).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {model!r} is none of {', '.join(SHAPES)} and no config.json that can be read: {error}"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("num_hidden_layers"), int):
        raise ConfigError(f"--model {model!r} has no number num_hidden_layers: give the config.json of a Llama")
    return config


def with_layers(config: Config, layers: int) -> Config:
    """A config cut to its first layers."""
    cut = config | {"num_hidden_layers": layers}
    # One entry a layer, where there is one.
    return cut | {"layer_types": cut["layer_types"][:layers]} if cut.get("layer_types") else cut


def multiplied_weights(config: Config) -> int:
    """Weights that each token is multiplied with: those of linear layers and the head, not of the embedding."""
    layers = find_dense_layers(empty_model(config), include=None, exclude=None, filter_fn=None)
    return sum(layer.weight.numel() for layer in layers)


def layers_that_fit(config: Config, models: Sequence[TernaryConfig | None], dtype: torch.dtype, free_bytes: int) -> int:
    """How many layers of a model, at most its own number, several contenders can hold at the same time.

    Args:
        config: of the model.
        models: what each contender is made of: None for dense.
        dtype: of dense weights.
        free_bytes: of the device.

    Raises:
        ConfigError: if not even one layer fits.
    """
    numbers = [
        sum(parameter.numel() for parameter in empty_model(with_layers(config, layers)).parameters())
        for layers in (1, 2)
    ]
    in_layer, elsewhere = numbers[1] - numbers[0], 2 * numbers[0] - numbers[1]
    bits = [8 * dtype.itemsize if model is None else 2 * model.planes + 8 / model.group_size for model in models]
    fixed = len(models) * (elsewhere * dtype.itemsize + OVERHEAD_BYTES)
    layers = int((free_bytes - fixed) / (in_layer * sum(bits) / 8))
    if layers < 1:
        raise ConfigError(
            f"not one layer fits: {free_bytes / 1e9:.1f} GB are free, and {len(models)} contenders need "
            f"{fixed / 1e9:.1f} GB without any: use a smaller --model or fewer --kernels"
        )
    return min(layers, int(config["num_hidden_layers"]))


@torch.no_grad()
def random_model(
    config: Config, ternary: TernaryConfig | None, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A causal language model of transformers with random weights, the same each time.

    Args:
        config: content of config.json.
        ternary: what its linear layers are made of, those that `ternarize` would take; None for a dense model.
        dtype: of floating-point parameters.
        device: of all parameters and buffers.

    Returns:
        The model, frozen and in eval mode.

    Raises:
        CheckpointError: if transformers is missing or knows no such model.
    """
    model = empty_model(config)
    generator = torch.Generator(device).manual_seed(0)
    if ternary is not None:
        for dense in find_dense_layers(model, include=None, exclude=None, filter_fn=None):
            if dense.skip is None:
                N, K = dense.weight.shape
                layer = _random_layer(N, K, ternary, dtype, generator)
                layer.name = dense.name
                for name in dense.names:
                    model.set_submodule(name, layer)
    _fill(model, generator, dtype, gain=GAIN, embedding_std=1.0)
    return freeze(model.to(device)).eval().requires_grad_(False)


@torch.no_grad()
def trainable_model(config: Config, ternary: TernaryConfig | None, *, device: torch.device) -> nn.Module:
    """A causal language model of transformers at the start of its training, the same each time.

    Args:
        config: content of config.json.
        ternary: what its linear layers are made of, from float32 weights that are the dense model's; None for dense.
        device: of all parameters and buffers.

    Returns:
        The model in train mode, its float parameters in float32. Matrices keep the size of what they multiply
        (K^-0.5, as in `ternarize train`), and so does the embedding, which may be the head too.

    Raises:
        CheckpointError: if transformers is missing or knows no such model.
        ConversionError: if nothing in it can be made ternary.
    """
    model = empty_model(config)
    _fill(model, torch.Generator(device).manual_seed(0), torch.float32, gain=1.0, embedding_std=None)
    model.to(device).train()
    attend_causally(model)
    return model if ternary is None else ternarize(model, ternary)


def _fill(
    model: nn.Module, generator: torch.Generator, dtype: torch.dtype, *, gain: float, embedding_std: float | None
) -> None:
    """Make the parameters that have no memory yet: normal with standard deviation gain · K^-0.5 [N, K], or 1 [N]."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
                std = gain * values.shape[-1] ** -0.5
                if isinstance(module, nn.Embedding) and embedding_std is not None:
                    std = embedding_std
                # Vectors are gains of norms, or biases that do no harm.
                values = values.normal_(std=std, generator=generator) if values.dim() == 2 else values.fill_(1)
                setattr(module, name, nn.Parameter(values))
    tie_weights(model)


def attend_causally(model: nn.Module) -> None:
    """Let a model attend without a mask tensor, as it may when all it attends to is what it is given.

    Traced, transformers cannot see that and builds the mask, with which PyTorch has no flash attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
    model.set_attn_implementation("causal_sdpa")  # type: ignore[operator]  # a method that transformers adds


def attend_in_groups(model: nn.Module) -> None:
    """Let the heads that share keys and values attend as rows of one query, where each sequence adds one token.

    What transformers does for one token in eager mode. Traced, it copies keys and values for every head instead, in
    each layer at each step, which can take as long as attention itself.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("grouped_sdpa", _grouped_attention)
    AttentionMaskInterface.register("grouped_sdpa", sdpa_mask)
    model.set_attn_implementation("grouped_sdpa")  # type: ignore[operator]  # a method that transformers adds


def _grouped_attention(
    module: nn.Module,  # noqa: ARG001  # transformers passes it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one token a sequence, as transformers calls it.

    Args:
        module: the attention layer.
        query: [B, H, 1, D].
        key: [B, heads of keys, S, D].
        value: likewise.
        attention_mask: [B, 1, 1, S], the same for all heads.
        scaling: of query · key.

    Returns:
        [B, 1, H, D].
    """
    B, H, D = query.shape[0], query.shape[1], query.shape[3]
    grouped = query.view(B, key.shape[1], -1, D)
    y = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(B, 1, H, D), None


def _random_layer(
    N: int, K: int, config: TernaryConfig, dtype: torch.dtype, generator: torch.Generator
) -> TernaryLinear:
    """Uniform levels and three neighbouring exponents, of about the size of dense weights."""
    top, device = largest_level(config.planes), generator.device
    levels = torch.randint(-top, top + 1, (N, K), dtype=torch.int8, device=device, generator=generator)
    middle = round(math.log2(GAIN / top * K**-0.5))
    groups = (N, groups_per_row(K, config.group_size))
    E = torch.randint(middle - 1, middle + 2, groups, dtype=torch.int8, device=device, generator=generator)
    return TernaryLinear.from_levels(levels, E, config=config, dtype=dtype)
