"""Models to folders and back: `save_pretrained`, `from_pretrained` and, for modules of any kind, `load_into`."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.checkpoint.format import TRAINING, WEIGHTS, PackedLayer, quantization_config
from ternarize.checkpoint.packed import PackedCheckpoint
from ternarize.checkpoint.safetensors_files import SafetensorsFiles
from ternarize.checkpoint.source import CONFIG_FILE, TensorInfo
from ternarize.checkpoint.transformers_model import empty_model, is_conv1d, is_linear, tie_weights
from ternarize.checkpoint.write import ShardWriter, new_folder, parse_size, write_json
from ternarize.errors import CheckpointError, ConfigError, ConversionError
from ternarize.layer import TRAINING_STATE, TernaryLinear, ternary_layers

GENERATION_CONFIG_FILE = "generation_config.json"


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    training_state: bool = False,
    force: bool = False,
) -> None:
    """Write a model with ternary layers to a folder, in the format of docs/format.md.

    Args:
        model: any module; of a transformers model, its configuration is written too, so that `from_pretrained` can
            build it. Parameters that modules share are written once.
        directory: the folder; it appears only when all of it is on disk.
        max_shard_size: of a weights file, like '5GB', or bytes.
        training_state: also write the integer state of the update rule, to training_state.safetensors.
        force: replace the folder if it exists.

    Raises:
        ConversionError: if the model has no ternary layer.
        ConfigError: for ``training_state`` of a model without any.
        CheckpointError: if the folder exists and ``force`` is not given.
    """
    layers = {name: PackedLayer.of(layer) for name, layer in ternary_layers(model)}
    if not layers:
        raise ConversionError("the model has no ternary layer: call ternarize(model) first")
    weights, training = _split_state(model)
    if training_state and not training:
        raise ConfigError("the model keeps no training state: save it with training_state=False")
    shard_bytes = parse_size(max_shard_size)
    with new_folder(Path(directory), force=force) as folder:
        _write_tensors(folder, WEIGHTS, weights, shard_bytes)
        if training_state:
            _write_tensors(folder, TRAINING, training, sys.maxsize)
        write_json(folder / CONFIG_FILE, {**_model_config(model), "quantization_config": quantization_config(layers)})
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            write_json(folder / GENERATION_CONFIG_FILE, json.loads(generation_config.to_json_string()))


def from_pretrained(
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> nn.Module:
    """Build the transformers model of a packed folder and load its weights, a tensor at a time.

    Args:
        directory: that `ternarize convert` or `save_pretrained` wrote.
        device: of the model; the CPU by default.
        dtype: of the floating-point parameters; as stored by default.
        trainable: whether the ternary layers keep state for training: the stored one, or a fresh one if none is there.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: if the folder is damaged, is of another version or kind, or does not fit the model.
        ConfigError: for trainable layers of several planes.
    """
    checkpoint = PackedCheckpoint(directory)
    config = checkpoint.config or {}
    if "model_type" not in config:
        raise CheckpointError(
            f"{checkpoint.path} describes no transformers model: build the module and use load_into(model, directory)"
        )
    model = empty_model(config)
    _fill(model, checkpoint, device=device, dtype=dtype, trainable=trainable)
    generation_config = checkpoint.path / GENERATION_CONFIG_FILE
    if generation_config.is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
        # transformers raises whatever comes to it.
        except Exception as error:
            raise CheckpointError(f"{generation_config} cannot be read ({error}): fetch or convert it again") from None
    return model.to(device).eval()


def empty_pretrained(checkpoint: PackedCheckpoint) -> nn.Module:
    """The transformers model of a packed folder on the meta device, for its shapes: its weights are not read.

    Raises:
        CheckpointError: if the folder names no model of transformers, or does not fit it.
    """
    model = empty_model(checkpoint.config or {})
    _swap(model, checkpoint, device="meta", dtype=None, trainable=False)
    return model


def load_into(model: nn.Module, directory: str | Path, *, trainable: bool = False) -> nn.Module:
    """Load a packed folder into a module of the same structure; its linear layers become ternary where the file says.

    Args:
        model: its dense layers (nn.Linear, transformers' Conv1D) or ternary ones are replaced in place, its other
            parameters and buffers are overwritten, each on its own device and in its own dtype; those on the meta
            device come to the CPU as stored.
        directory: that `ternarize convert` or `save_pretrained` wrote.
        trainable: as for `from_pretrained`.

    Returns:
        The same module.

    Raises:
        CheckpointError: if the folder is damaged or does not fit the module, which is then partly overwritten.
        ConfigError: for trainable layers of several planes.
    """
    _fill(model, PackedCheckpoint(directory), device=None, dtype=None, trainable=trainable)
    return model


def _split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inference tensors and training planes by name; what modules share once, under its first name."""
    planes = {f"{name}.{key}" for name, _ in ternary_layers(model) for key in TRAINING_STATE}
    weights: dict[str, Tensor] = {}
    training: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            (training if name in planes else weights)[name] = tensor
    return weights, training


def _write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    writer = ShardWriter(folder, stem, {name: TensorInfo.of(t) for name, t in tensors.items()}, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


def _model_config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    content: dict[str, Any] = json.loads(config.to_json_string())
    return {**content, "architectures": [type(model).__name__]}


def _stored_dtype(config: dict[str, Any] | None) -> torch.dtype | None:
    """The dtype that config.json states; transformers before 5 called it torch_dtype."""
    stated = (config or {}).get("dtype") or (config or {}).get("torch_dtype")
    dtype = getattr(torch, str(stated), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _fill(
    model: nn.Module,
    checkpoint: PackedCheckpoint,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    trainable: bool,
) -> None:
    _swap(model, checkpoint, device=device, dtype=dtype, trainable=trainable)
    loaded = _load(model, checkpoint, device=device, dtype=dtype)
    state = checkpoint.training_state() if trainable else None
    if state is not None:
        loaded |= _load(model, state, device=device, dtype=None)
    tie_weights(model)
    fresh = {f"{name}.{key}" for name, _ in ternary_layers(model) for key in TRAINING_STATE}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in loaded and name not in fresh:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r}, which {type(model).__name__} needs, is in no file: "
                "convert again, or load it into the model that was saved"
            )


def _swap(
    model: nn.Module,
    checkpoint: PackedCheckpoint,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    trainable: bool,
) -> None:
    """Put an empty ternary layer wherever the checkpoint has one, under every name that the dense one goes by."""
    modules = dict(model.named_modules(remove_duplicate=False))
    sharing: dict[int, list[str]] = {}
    for name, module in modules.items():
        if _is_replaceable(module):
            sharing.setdefault(id(_stored_weight(module)), []).append(name)
    for name, packed in checkpoint.layers.items():
        old = modules.get(name)
        if old is None or not _is_replaceable(old):
            kind = "missing" if old is None else f"a {type(old).__name__}"
            raise CheckpointError(
                f"{checkpoint.path}: layer {name!r} is ternary, in {type(model).__name__} it is {kind}: "
                "load it into the model that was saved"
            )
        weight = _stored_weight(old)
        shape = _features(old)
        if shape != (packed.out_features, packed.in_features):
            raise CheckpointError(
                f"{checkpoint.path}: layer {name!r} is {packed.out_features}x{packed.in_features}, in "
                f"{type(model).__name__} it is {shape[0]}x{shape[1]}: load it into the model that was saved"
            )
        dense_dtype = old.dtype if isinstance(old, TernaryLinear) else weight.dtype
        layer = packed.empty(
            trainable=trainable,
            device=device or ("cpu" if weight.is_meta else weight.device),
            dtype=dtype or (_stored_dtype(checkpoint.config) if weight.is_meta else None) or dense_dtype,
        )
        layer.name = name
        for alias in sharing[id(weight)]:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def _is_replaceable(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, TernaryLinear)


def _stored_weight(module: Any) -> nn.Parameter:
    """The parameter that holds the weight: layers that share it are one layer in a checkpoint."""
    parameter: nn.Parameter = module.T_packed if isinstance(module, TernaryLinear) else module.weight
    return parameter


def _features(module: Any) -> tuple[int, int]:
    """(N, K) of a linear layer of any kind."""
    if is_conv1d(module):
        in_features, out_features = module.weight.shape
        return int(out_features), int(in_features)
    return int(module.out_features), int(module.in_features)


def _load(
    model: nn.Module, files: SafetensorsFiles, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> set[int]:
    """Load every tensor of the files into the model; the identities of the model's tensors that were filled."""
    targets = model.state_dict(keep_vars=True)
    loaded: set[int] = set()
    for name, info in files.tensors.items():
        target = targets.get(name)
        if target is None:
            warnings.warn(f"{files.file_of[name]}: the model has no tensor {name!r}, it is ignored", stacklevel=2)
            continue
        if tuple(target.shape) != info.shape:
            raise CheckpointError(
                f"{files.file_of[name]}: tensor {name!r} is {info}, the model needs {TensorInfo.of(target)}: "
                "load it into the model that was saved"
            )
        tensor = files.load(name)
        if target.is_meta:
            cast = dtype if info.dtype.is_floating_point else None
            # A copy: a view would keep the file mapped for as long as the model lives.
            tensor = tensor.to(device=device or "cpu", dtype=cast, copy=True)
            target = _replace(model, name, target, tensor)
        else:
            with torch.no_grad():
                target.copy_(tensor)
        loaded.add(id(target))
    return loaded


def _replace(model: nn.Module, name: str, target: Tensor, tensor: Tensor) -> Tensor:
    """Put a loaded tensor where the model has one on the meta device."""
    parent, _, child = name.rpartition(".")
    value = nn.Parameter(tensor, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else tensor
    setattr(model.get_submodule(parent), child, value)
    return value
