"""What transformers knows about a checkpoint: its model class, without weights, and which modules are linear."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ternarize.errors import CheckpointError


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The model of a transformers config: parameters on the meta device, tied; buffers that are computed are real.

    Args:
        config: content of config.json. ``architectures`` names the class; without it, the causal language model.

    Raises:
        CheckpointError: if transformers is not installed or has no such model.
    """
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise CheckpointError(
            f"building a model from config.json needs {error.name}: pip install 'ternarize[transformers]'"
        ) from None
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"transformers {transformers.__version__} has no model_type {model_type!r}: update it")
    # A config that names a quantiser would be handed to transformers' own quantisers.
    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        architecture = next(iter(config.get("architectures") or ()), None)
        model_class = getattr(transformers, architecture, None) if architecture else None
        model_config = transformers.AutoConfig.for_model(model_type, **fields)
        with init_empty_weights(include_buffers=False):
            model: nn.Module = (
                model_class(model_config)
                if model_class is not None
                else transformers.AutoModelForCausalLM.from_config(model_config)
            )
    # Configs and constructors of a hundred architectures raise whatever comes to them.
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build a {model_type!r} from config.json ({error}): mend it"
        ) from error
    tie_weights(model)
    return model.eval()


def tie_weights(model: nn.Module) -> None:
    """Tie what the model's config says is tied; nothing for a model that is not transformers'."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()


def model_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint names to the model's: with or without the prefix of the base model (GPT-2's files lack it)."""
    known = model.state_dict().keys()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    renamed = {}
    for name in names:
        candidates = (name, prefix + name, name.removeprefix(prefix))
        renamed[name] = next((candidate for candidate in candidates if candidate in known), name)
    return renamed


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D: a linear layer whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an nn.Linear itself (a subclass may compute something else) or a Conv1D."""
    return type(module) is nn.Linear or is_conv1d(module)
