"""The model of a run: the built-in decoder or one of transformers', its matrices made ternary or left as a baseline."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ternarize.api import ternarize
from ternarize.candidates import find_dense_layers
from ternarize.causal import positions, require_causal
from ternarize.checkpoint.source import CONFIG_FILE
from ternarize.errors import CheckpointError, ConfigError, out_of_memory
from ternarize.optim import build_optimizer
from ternarize.train.settings import TrainSettings

HEAD_FEATURES = 64

#: Of AdamW, for float parameters under every rule, and its weight decay on the matrices of the baselines.
BETAS, MATRIX_DECAY = (0.9, 0.95), 0.05


class StraightThrough(nn.Module):
    """The weight that a straight-through baseline multiplies with: trits times the mean magnitude of the matrix.

    The rounding of BitNet b1.58 (Ma et al., 2024, arXiv:2402.17764), without its 8-bit activations. The gradient goes
    to the float weight unchanged.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Round a matrix."""
        scale = weight.detach().abs().mean().clamp_min(1e-6)
        rounded = (weight.detach() / scale).round().clamp(-1, 1) * scale
        # Exactly the rounded weight, with the gradient of the weight.
        return rounded + (weight - weight.detach())


def builtin_config(*, hidden: int, layers: int, ctx: int, vocabulary: int) -> Any:
    """The built-in decoder: a Llama with heads of 64 features and a feed-forward of 8/3 the width.

    Width 768 with 12 layers gives 84.9M weights in the matrices of the blocks.

    Args:
        hidden: features, a multiple of 64, which each head has.
        layers: blocks.
        ctx: tokens a window.
        vocabulary: number of tokens.

    Returns:
        A transformers config.

    Raises:
        ConfigError: for sizes that mean nothing.
    """
    from transformers import LlamaConfig

    if hidden < HEAD_FEATURES or hidden % HEAD_FEATURES:
        raise ConfigError(f"hidden is {hidden}: use a multiple of {HEAD_FEATURES}, the features of a head")
    if layers < 1:
        raise ConfigError(f"layers is {layers}: use at least 1")
    heads = hidden // HEAD_FEATURES
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        # The next multiple of 64.
        intermediate_size=-(-8 * hidden // (3 * 64)) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=ctx,
        # Outputs of about the size of inputs, at any width.
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )


def read_model_config(path: Path, *, vocabulary: int) -> Any:
    """The config of a causal language model of transformers, to be trained from scratch.

    Args:
        path: a config.json, or a folder with one; weights beside it are not read.
        vocabulary: number of tokens of the tokenizer.

    Raises:
        ConfigError: if it cannot be trained on such tokens.
        CheckpointError: if it is no config that transformers knows.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("quantization_config", None)
        model_type = content.pop("model_type", None)
        # What transformers says of an unknown one are the names of all that it knows.
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"model_type is {model_type!r}")
        config = AutoConfig.for_model(model_type, **content)
    # Configs of a hundred architectures raise whatever comes to them.
    except Exception as error:
        raise CheckpointError(f"{file} is no config of a transformers model ({error}): give a config.json") from None
    known = getattr(config.get_text_config(decoder=True), "vocab_size", 0)
    if known < vocabulary:
        raise ConfigError(f"{file} has vocab_size {known}, the tokenizer {vocabulary}: raise it")
    return config


def build_model(config: Any, settings: TrainSettings, device: torch.device) -> nn.Module:
    """The model in its first state, which under every rule comes from the same float32 weights.

    Raises:
        CheckpointError: if transformers cannot build it, or it is not causal.
        ConfigError: if it has fewer positions than a window.
        ConversionError: if nothing in it can be made ternary.
    """
    from transformers import AutoModelForCausalLM

    # On the CPU, so that the first weights do not depend on the device.
    torch.manual_seed(settings.seed)
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(f"transformers cannot build a {config.model_type!r} ({error}): mend the config") from None
    longest = positions(model)
    if longest < settings.ctx:
        raise ConfigError(
            f"{type(model).__name__} has {longest} positions, ctx is {settings.ctx}: raise max_position_embeddings in "
            "its config, or lower ctx"
        )
    require_causal(model.eval())
    if settings.ternary is not None:
        ternarize(model, settings.ternary)
    elif settings.rule == "ste":
        for module in _matrices(model):
            parametrize.register_parametrization(module, "weight", StraightThrough())
    return model.to(device).train()


def bake(model: nn.Module) -> nn.Module:
    """Replace the float weights of a straight-through model by the rounded ones that its forward used, in place."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


def make_optimizer(model: nn.Module, settings: TrainSettings, *, skip_nonfinite: bool) -> torch.optim.Optimizer:
    """The optimizer of a rule: AdamW without weight decay for what is no matrix, and the rule for the matrices.

    Args:
        model: as `build_model` made it.
        settings: of the run.
        skip_nonfinite: as of `ternarize.TernaryOptimizer`; the float baselines do not look at gradients.
    """
    fused = next(model.parameters()).is_cuda
    if settings.ternary is not None:
        return build_optimizer(
            model,
            torch.optim.AdamW,
            ternary={"lr": settings.matrix_lr, "seed": settings.seed, "skip_nonfinite": skip_nonfinite},
            lr=settings.float_lr,
            betas=BETAS,
            weight_decay=0.0,
            fused=fused,
        )
    weights = _float_matrices(model)
    ids = {id(weight) for weight in weights}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in ids], "lr": settings.float_lr, "weight_decay": 0.0},
        {"params": weights, "lr": settings.matrix_lr, "weight_decay": MATRIX_DECAY},
    ]
    return torch.optim.AdamW(groups, betas=BETAS, fused=fused)


def _matrices(model: nn.Module) -> list[nn.Module]:
    """The linear layers that `ternarize` would make ternary: those that learn differently from rule to rule."""
    return [layer.module for layer in find_dense_layers(model, None, None, None) if layer.skip is None]


def _float_matrices(model: nn.Module) -> list[Tensor]:
    """The weights of those layers under a float baseline."""
    rounded: list[Any] = [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]
    if rounded:
        return [module.parametrizations.weight.original for module in rounded]
    return [module.get_parameter("weight") for module in _matrices(model)]
