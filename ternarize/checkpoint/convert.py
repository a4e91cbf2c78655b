"""Checkpoints to packed ones, a tensor at a time."""

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.checkpoint.bitnet import BitNetFiles
from ternarize.checkpoint.format import QUANT_METHOD, TRAINING, WEIGHTS, quantization_config
from ternarize.checkpoint.packed import PackedCheckpoint
from ternarize.checkpoint.plan import Plan, make_plan
from ternarize.checkpoint.read import open_checkpoint
from ternarize.checkpoint.source import CONFIG_FILE, Source, TensorInfo, quant_method
from ternarize.checkpoint.write import ShardWriter, check_destination, new_folder, parse_size, write_json
from ternarize.config import TernaryConfig
from ternarize.errors import ConfigError, ConversionError
from ternarize.layer import TRAINING_STATE
from ternarize.packing import ROW, pack, row_strips, split_planes
from ternarize.quantize import is_ternary, quantize_bias, quantize_weight, relative_error

DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """What became of one weight matrix."""

    name: str
    shape: tuple[int, int]
    """(N, K)."""
    reason: str | None
    """Why it stays dense, or None if it is ternary."""
    bytes_before: int
    """Of the weight in the source."""
    bytes_after: int
    """Of the weight, or of its trits and exponents."""
    weight_error: float | None
    """|W - W'|² / |W|²; None if it stays dense."""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What `convert` did."""

    source: str
    destination: str
    source_format: str
    identified_by: str
    """How linear layers were told from other matrices."""
    planes: int | None
    """Of the new layers; None if the source was ternary already."""
    layers: tuple[ConvertedLayer, ...]
    bytes_before: int
    """Of all tensors in the source."""
    bytes_after: int
    """Of all tensors in the result."""
    bits_per_weight: float
    """Bits of trits and exponents over weights, in the ternary layers."""
    rounded_ternary: bool
    """Whether the first of the converted weights was ternary already: ``init="exact"`` would have kept it."""

    @property
    def converted(self) -> list[ConvertedLayer]:
        """The layers that became ternary."""
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def kept(self) -> list[ConvertedLayer]:
        """The matrices that stay dense."""
        return [layer for layer in self.layers if layer.reason is not None]

    @property
    def mean_weight_error(self) -> float | None:
        """Mean of the layers' errors; None if none was converted."""
        errors = [layer.weight_error for layer in self.layers if layer.weight_error is not None]
        return sum(errors) / len(errors) if errors else None

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {**dataclasses.asdict(self), "mean_weight_error": self.mean_weight_error}


def convert(
    source: str | Path,
    destination: str | Path,
    config: TernaryConfig | None = None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    trainable: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ConversionReport:
    """Convert a checkpoint to the packed format, streaming.

    Memory beyond the start stays under three times the largest tensor in float32, plus the bounded scratch of
    `ternarize.quantize`. A source that is packed already is copied: new shards, the same tensors.

    Args:
        source: what `open_checkpoint` reads.
        destination: folder to write; it appears only when all of it is on disk.
        config: group size, planes and init of the new layers; by default three planes, which need no training, or for
            BitNet's packed checkpoints, which are ternary already, ``init="exact"``, whole rows and int8 activations.
        include: if given, only layers whose names match one of these patterns are converted.
        exclude: layers that match one of these stay dense, beside the default ones (`ternarize.skip`).
        max_shard_size: of a weights file, like '5GB', or bytes.
        dtype: of the floating-point tensors that stay dense; as in the source by default (float32 for GGUF).
        trainable: also write training_state.safetensors, where training starts: its accumulators hold what rounding to
            one plane left. Without it, training starts from the trits alone.
        force: replace ``destination`` if it exists; the old folder goes when the new one is complete.
        progress: called after each tensor with its name, the bytes of the source that are done, and all of them.

    Returns:
        What was converted and what was not, with the reasons.

    Raises:
        CheckpointError: if the source cannot be read or the destination must not be written.
        ConversionError: if nothing can be converted, or weights are not finite, or not ternary for ``init="exact"``.
        ConfigError: for an option that means nothing.
    """
    destination = Path(destination)
    shard_bytes = parse_size(max_shard_size)
    if dtype is not None and dtype not in DENSE_DTYPES:
        raise ConfigError(f"dtype {dtype} is not one of float32, bfloat16 and float16")
    check_destination(destination, force=force, source=Path(source))
    checkpoint = open_checkpoint(source)
    config = _config_for(checkpoint, config)
    if trainable and config.planes > 1:
        raise ConfigError(f"trainable needs one trit plane, not {config.planes}: use planes=1, or leave trainable out")
    if trainable and isinstance(checkpoint, PackedCheckpoint):
        raise ConfigError(f"{source} is ternary already, what rounding left is lost: convert the dense checkpoint")
    _refuse_quantized(checkpoint)
    plan = make_plan(checkpoint, config, include, exclude)
    _refuse_nothing(checkpoint, plan)
    outputs = _outputs(checkpoint, plan, dtype)
    errors: dict[str, float] = {}
    done, total = 0, sum(checkpoint.stored_bytes(name) for name in checkpoint.tensors)
    with new_folder(destination, force=force) as folder:
        writer = ShardWriter(folder, WEIGHTS, outputs, shard_bytes)
        training = ShardWriter(folder, TRAINING, _training_outputs(plan), sys.maxsize) if trainable else None
        for name, target in plan.targets.items():
            errors |= _convert_tensor(checkpoint, name, target, plan, config, outputs, writer, training)
            done += checkpoint.stored_bytes(name)
            if progress is not None:
                progress(target, done, total)
        writer.finish()
        if training is not None:
            training.finish()
        checkpoint.save_companions(folder)
        _copy_training_state(checkpoint, folder)
        write_json(folder / CONFIG_FILE, _config(checkpoint, plan, dtype))
    return _report(checkpoint, destination, plan, config, outputs, errors, total)


def _rounds_ternary(checkpoint: Source, plan: Plan, config: TernaryConfig) -> bool:
    first = next((name for name, candidate in plan.candidates.items() if candidate.reason is None), None)
    if config.init == "exact" or first is None:
        return False
    weight = checkpoint.load(first)
    return is_ternary(weight.T if plan.candidates[first].transposed else weight, config.group_size)


def _config_for(checkpoint: Source, config: TernaryConfig | None) -> TernaryConfig:
    """What was asked for, or what suits the checkpoint: BitNet's matrices have one scale each, and layers take int8."""
    if not isinstance(checkpoint, BitNetFiles):
        return config or TernaryConfig(planes=3, init="least_squares")
    config = config or TernaryConfig(group_size=ROW, init="exact", activation="int8")
    if (config.init, config.activation) != ("exact", "int8"):
        raise ConfigError(
            f"{checkpoint.path} is ternary already, and its layers take int8: use init='exact' and activation='int8' "
            "(--init exact --activation int8)"
        )
    return config


def _refuse_quantized(checkpoint: Source) -> None:
    method = quant_method(checkpoint.config)
    if method not in (None, QUANT_METHOD):
        raise ConversionError(
            f"{checkpoint.path} is already quantised, by {method!r}: convert the original dense checkpoint"
        )


def _refuse_nothing(checkpoint: Source, plan: Plan) -> None:
    if plan.layers:
        return
    if not plan.candidates:
        raise ConversionError(f"{checkpoint.path} has no weight matrix: there is no linear layer to convert")
    reason, count = Counter(candidate.reason for candidate in plan.candidates.values()).most_common(1)[0]
    raise ConversionError(
        f"no layer of {checkpoint.path} would be converted ({count} of {len(plan.candidates)} matrices: {reason}): "
        "change include or exclude"
    )


def _outputs(checkpoint: Source, plan: Plan, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Every tensor of the result, in the order of the source."""
    outputs: dict[str, TensorInfo] = {}
    packed = {key for name, layer in plan.layers.items() for key in layer.tensors(name)}
    for name, target in plan.targets.items():
        info = checkpoint.tensors[name]
        candidate = plan.candidates.get(name)
        if candidate is not None and candidate.reason is None:
            outputs |= plan.layers[candidate.name].tensors(candidate.name)
        elif target not in packed or isinstance(checkpoint, PackedCheckpoint):
            cast = dtype is not None and info.dtype in DENSE_DTYPES
            outputs[target] = TensorInfo(info.shape, dtype) if cast and dtype is not None else info
    return outputs


def _training_outputs(plan: Plan) -> dict[str, TensorInfo]:
    """Every tensor of training_state.safetensors."""
    return {
        key: info for name, layer in plan.layers.items() for key, info in layer.tensors(name, training=True).items()
    }


def _convert_tensor(
    checkpoint: Source,
    name: str,
    target: str,
    plan: Plan,
    config: TernaryConfig,
    outputs: Mapping[str, TensorInfo],
    writer: ShardWriter,
    training: ShardWriter | None,
) -> dict[str, float]:
    """Write what one tensor of the source becomes; the layer's name and weight error if it is a converted weight."""
    candidate = plan.candidates.get(name)
    layer, _, kind = target.rpartition(".")
    tensor = checkpoint.load(name)
    if candidate is not None and candidate.reason is None:
        weight = tensor.T if candidate.transposed else tensor
        packed, error = _pack_weight(weight, config, name, trainable=training is not None)
        T_accum = packed.pop("T_accum", None)
        for key, value in packed.items():
            writer.write(f"{layer}.{key}", value)
        if training is not None:
            fresh = plan.layers[layer].empty(trainable=True).state_dict() | {"T_accum": T_accum}
            for key in TRAINING_STATE:
                if key in fresh:
                    training.write(f"{layer}.{key}", fresh[key])
        return {layer: error}
    if kind == "bias" and layer in plan.layers and tensor.is_floating_point():
        bias, bias_exponent = quantize_bias(tensor, name=name)
        writer.write(f"{layer}.bias", bias)
        writer.write(f"{layer}.bias_exponent", bias_exponent)
    else:
        writer.write(target, tensor.to(outputs[target].dtype))
    return {}


def _pack_weight(
    weight: Tensor, config: TernaryConfig, name: str, *, trainable: bool
) -> tuple[dict[str, Tensor], float]:
    """T_packed, E, T_accum if trainable, E_mantissa if exact, and the relative squared error of a dense weight.

    By strips of rows, so that scratch is bounded.
    """
    rows, in_features = weight.shape
    group_size = ROW if config.group_size >= in_features else config.group_size
    strips: dict[str, list[Tensor]] = {"T_packed": [], "E": [], "T_accum": [], "E_mantissa": []}
    error = total = 0.0
    for strip in row_strips(rows, in_features):
        quantized = quantize_weight(weight[strip], config, trainable=trainable, name=name)
        levels = quantized.levels
        strips["T_packed"].append(
            pack(levels if config.planes == 1 else split_planes(levels, config.planes), group_size)
        )
        strips["E"].append(quantized.E)
        if quantized.T_accum is not None:
            strips["T_accum"].append(quantized.T_accum)
        if quantized.E_mantissa is not None:
            strips["E_mantissa"].append(quantized.E_mantissa)
        energy = weight[strip].to(torch.float64).square().sum().item()
        error += energy * relative_error(weight[strip], quantized, group_size)
        total += energy
    # Rows are the last but one dimension, also of several planes.
    tensors = {key: torch.cat(found, -2) for key, found in strips.items() if found}
    return tensors, error / total if total else 0.0


def _copy_training_state(checkpoint: Source, folder: Path) -> None:
    """The training planes of a packed source, checked and written again."""
    if not isinstance(checkpoint, PackedCheckpoint):
        return
    state = checkpoint.training_state()
    if state is None:
        return
    writer = ShardWriter(folder, TRAINING, state.tensors, max(1, sum(info.nbytes for info in state.tensors.values())))
    for name in state.tensors:
        writer.write(name, state.load(name))
    writer.finish()


def _config(checkpoint: Source, plan: Plan, dtype: torch.dtype | None) -> dict[str, Any]:
    config = dict(checkpoint.config or {})
    if dtype is not None:
        # transformers before 5 wrote torch_dtype.
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = quantization_config(plan.layers)
    return config


def _report(
    checkpoint: Source,
    destination: Path,
    plan: Plan,
    config: TernaryConfig,
    outputs: Mapping[str, TensorInfo],
    errors: Mapping[str, float],
    bytes_before: int,
) -> ConversionReport:
    layers = []
    for name, candidate in plan.candidates.items():
        after = outputs[plan.targets[name]].nbytes if candidate.reason else plan.layers[candidate.name].packed_bytes
        layers.append(
            ConvertedLayer(
                candidate.name,
                candidate.shape,
                candidate.reason,
                checkpoint.stored_bytes(name),
                after,
                errors.get(candidate.name),
            )
        )
    weights = sum(layer.in_features * layer.out_features for layer in plan.layers.values())
    return ConversionReport(
        source=str(checkpoint.path),
        destination=str(destination),
        source_format=checkpoint.format,
        identified_by=plan.identified_by,
        planes=None if isinstance(checkpoint, PackedCheckpoint) else config.planes,
        layers=tuple(layers),
        bytes_before=bytes_before,
        bytes_after=sum(info.nbytes for info in outputs.values()),
        bits_per_weight=8 * sum(layer.packed_bytes for layer in plan.layers.values()) / weights
        if weights
        else math.nan,
        rounded_ternary=_rounds_ternary(checkpoint, plan, config),
    )
