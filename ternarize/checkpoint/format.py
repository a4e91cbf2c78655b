"""Our format on disk, version 1: what config.json says of ternary layers and which tensors stand for one.

docs/format.md is the specification; this module is its code.
"""

import dataclasses
import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternarize.checkpoint.source import TensorInfo
from ternarize.config import TernaryConfig
from ternarize.errors import CheckpointError, ConfigError, ShapeError
from ternarize.layer import TRAINING_STATE, TernaryLinear
from ternarize.packing import groups_per_row

QUANT_METHOD = "ternarize"
FORMAT_VERSION = 1
PACKING = "u2_planar"
SCALE_OP = "mul"

#: Stems of the files: <stem>.safetensors, or its shards with <stem>.safetensors.index.json.
WEIGHTS = "model"
TRAINING = "training_state"

#: Significant bits of the float type whose scales an integer mantissa of this dtype holds: bfloat16, float16, float32.
MANTISSA_BITS = {torch.uint8: 8, torch.int16: 11, torch.int32: 24}

_CONFIG_FIELDS = {field.name for field in dataclasses.fields(TernaryConfig)}


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """A ternary layer as a checkpoint holds it."""

    config: TernaryConfig
    in_features: int
    out_features: int
    bias: bool = False
    mantissa: TensorInfo | None = None

    @classmethod
    def of(cls, layer: TernaryLinear) -> "PackedLayer":
        """What a checkpoint says of ``layer``."""
        mantissa = None if layer.E_mantissa is None else TensorInfo.of(layer.E_mantissa)
        return cls(layer.config, layer.in_features, layer.out_features, layer.bias is not None, mantissa)

    def empty(
        self,
        *,
        trainable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TernaryLinear:
        """A layer of this kind, its weights zero."""
        layer = TernaryLinear(
            self.in_features,
            self.out_features,
            self.bias,
            config=self.config,
            trainable=trainable,
            device=device,
            dtype=dtype,
        )
        if self.mantissa is not None:
            mantissa = torch.ones(self.mantissa.shape, dtype=self.mantissa.dtype, device=device)
            layer.E_mantissa = nn.Parameter(mantissa, requires_grad=False)
        return layer

    def tensors(self, name: str, *, training: bool = False) -> dict[str, TensorInfo]:
        """The layer's tensors in the weights file, or in the training file, by their names under ``name``."""
        state = self.empty(trainable=training, device="meta").state_dict()
        return {
            f"{name}.{key}": TensorInfo.of(tensor)
            for key, tensor in state.items()
            if (key in TRAINING_STATE) == training
        }

    @property
    def packed_bytes(self) -> int:
        """Bytes of trits and scales, without the bias."""
        return sum(info.nbytes for key, info in self.tensors("").items() if not key.startswith(".bias"))

    @property
    def bits_per_weight(self) -> float:
        """Bits of trits and scales over weights."""
        return 8 * self.packed_bytes / (self.in_features * self.out_features)


def tool_version() -> str:
    """Version of the installed package, for a checkpoint to say who wrote it."""
    try:
        return importlib.metadata.version("ternarize")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def quantization_config(layers: Mapping[str, PackedLayer]) -> dict[str, Any]:
    """The entry of config.json: the most common configuration, and under ``modules`` what differs from it by layer."""
    common = dataclasses.asdict(Counter(layer.config for layer in layers.values()).most_common(1)[0][0])
    modules: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        own = dataclasses.asdict(layer.config)
        override = {key: value for key, value in own.items() if value != common[key]}
        # Otherwise K is 4 times the bytes of a row.
        if layer.in_features % 4:
            override["in_features"] = layer.in_features
        if override:
            modules[name] = override
    mantissas = [MANTISSA_BITS[layer.mantissa.dtype] for layer in layers.values() if layer.mantissa is not None]
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "packing": PACKING,
        "scale_op": SCALE_OP,
        "scale_mantissa_bits": max(mantissas, default=0),
        **common,
        "modules": modules,
        "tool_version": tool_version(),
    }


def packed_layers(
    quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], file_of: Mapping[str, Path], where: Path
) -> dict[str, PackedLayer]:
    """The ternary layers of a checkpoint, every tensor of theirs checked by name, shape and dtype.

    Args:
        quantization: ``quantization_config`` of config.json.
        tensors: what the weights files hold.
        file_of: which file holds a tensor.
        where: config.json, for messages.

    Raises:
        CheckpointError: for another version, another packing, or tensors that do not fit each other.
    """
    _check_version(quantization, where)
    modules = quantization.get("modules") or {}
    if not isinstance(modules, dict) or not all(isinstance(fields, dict) for fields in modules.values()):
        raise CheckpointError(f"{where}: modules is no object of objects: convert the original again")
    layers = {}
    for key, info in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind != "T_packed":
            continue
        try:
            layers[name] = _packed_layer(name, info, {**quantization, **modules.get(name, {})}, tensors)
        except (ConfigError, ShapeError, TypeError) as error:
            raise CheckpointError(f"{where}: layer {name!r}: {error}; convert the original again") from None
        _check_tensors(name, layers[name], tensors, file_of)
    unused = modules.keys() - layers.keys()
    if unused:
        raise CheckpointError(
            f"{where} describes layer {min(unused)!r}, whose T_packed is in no file: fetch or convert it again"
        )
    if not layers:
        raise CheckpointError(f"{where} says quant_method ternarize, but no file holds a T_packed: convert it again")
    return layers


def _check_version(quantization: Mapping[str, Any], where: Path) -> None:
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version!r}, this ternarize reads {FORMAT_VERSION}: "
            "update ternarize, or convert the original again"
        )
    for key, known in (("packing", PACKING), ("scale_op", SCALE_OP)):
        if quantization.get(key) != known:
            raise CheckpointError(
                f"{where}: {key} is {quantization.get(key)!r}, format {FORMAT_VERSION} has {known!r}: "
                "convert the original again"
            )


def _packed_layer(
    name: str, T_packed: TensorInfo, fields: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> PackedLayer:
    if len(T_packed.shape) not in (2, 3):
        raise ShapeError(f"T_packed is {T_packed}, need [N, B] or [P, N, B]")
    out_features, row_bytes = T_packed.shape[-2:]
    fields = {"in_features": 4 * row_bytes, **fields}
    for key in ("group_size", "planes", "in_features"):
        # bool is an int to isinstance.
        if type(fields.get(key)) is not int:
            raise ConfigError(f"{key} is {fields.get(key)!r}, need an integer")
    if not 0 < fields["in_features"] <= 4 * row_bytes:
        raise ShapeError(f"in_features is {fields['in_features']}, rows of {row_bytes} bytes hold 1 to {4 * row_bytes}")
    config = TernaryConfig(**{key: value for key, value in fields.items() if key in _CONFIG_FIELDS})
    return PackedLayer(
        config,
        in_features=fields["in_features"],
        out_features=out_features,
        bias=f"{name}.bias" in tensors,
        mantissa=tensors.get(f"{name}.E_mantissa"),
    )


def _check_tensors(
    name: str, layer: PackedLayer, tensors: Mapping[str, TensorInfo], file_of: Mapping[str, Path]
) -> None:
    file = file_of[f"{name}.T_packed"]
    for key, needed in layer.tensors(name).items():
        got = tensors.get(key)
        if got is None:
            raise CheckpointError(f"{file}: tensor {key!r} is missing: fetch or convert it again")
        if got != needed:
            raise CheckpointError(
                f"{file_of[key]}: tensor {key!r} is {got}, need {needed} for {layer.out_features}x{layer.in_features} "
                f"weights of group_size {layer.config.group_size} and {layer.config.planes} planes: "
                "put back the config.json that was written with it, or convert it again"
            )
    if layer.mantissa is not None:
        groups = groups_per_row(layer.in_features, layer.config.group_size)
        shape = layer.mantissa.shape
        broadcasts = len(shape) == 2 and shape[0] in (1, layer.out_features) and shape[1] in (1, groups)
        if layer.mantissa.dtype not in MANTISSA_BITS or not broadcasts:
            raise CheckpointError(
                f"{file_of[f'{name}.E_mantissa']}: tensor '{name}.E_mantissa' is {layer.mantissa}, need uint8, int16 "
                f"or int32 that broadcasts to [{layer.out_features}, {groups}]: convert it again"
            )
