"""What a checkpoint is to a reader: names, shapes and dtypes at no cost, one tensor at a time at its price."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ternarize.errors import CheckpointError

CONFIG_FILE = "config.json"

#: Suffixes of files that hold weights, of any framework: never copied along with a converted model.
WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".ckpt")
)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        """Shape and dtype of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Source(Protocol):
    """A checkpoint that can be read: one implementation a file format."""

    format: str
    """Name of the file format, for people."""

    path: Path
    """What the user named."""

    config: dict[str, Any] | None
    """The transformers configuration (config.json), or None for bare weights."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its name in the model, as `load` returns it."""
        ...

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU. The source keeps no reference to it.

        Raises:
            CheckpointError: if its bytes are not what its file says.
        """
        ...

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in its file."""
        ...

    def save_companions(self, folder: Path) -> None:
        """Write what a model needs beside its weights and config.json (the tokenizer, the licence) to ``folder``."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if there is no such file, or something else is in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # Nesting without end is a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, need an object: fetch it again")
    return content


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json of a folder, if ``path`` is one that has it; its ``quantization_config`` is an object if there."""
    file = path / CONFIG_FILE
    if not file.is_file():
        return None
    config = read_json(file)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise CheckpointError(
            f"{file}: quantization_config is a JSON {type(quantization).__name__}, need an object: fetch it again"
        )
    return config


def quant_method(config: Mapping[str, Any] | None) -> str | None:
    """How config.json says that the weights are quantised; None for dense ones."""
    return ((config or {}).get("quantization_config") or {}).get("quant_method")


def files_of_index(index: Path) -> list[Path]:
    """The shards that an index file names, each once, in order.

    Raises:
        CheckpointError: if the index is damaged or a shard is absent.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: fetch it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must give each tensor the name of its file: fetch it again")
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, {index.name} names it: fetch it again")
    return files


def companion_files(path: Path) -> list[Path]:
    """Files of a folder that belong to its model and are neither weights nor config.json; none for a file."""
    if not path.is_dir():
        return []
    return [
        file
        for file in sorted(path.iterdir())
        if file.is_file()
        and file.suffix not in WEIGHT_SUFFIXES
        and file.name != CONFIG_FILE
        and not file.name.endswith(".index.json")
        and not file.name.startswith(".")
    ]
