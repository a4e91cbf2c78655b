"""Safetensors: one file or a folder of shards, dense or packed, with the checksums that ours carry."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ternarize.checkpoint.source import TensorInfo, companion_files, read_config
from ternarize.errors import CheckpointError

#: safetensors' names of dtypes: https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

#: Keys of __metadata__ that hold the SHA-256 of a tensor's bytes start with this, and its name follows.
CHECKSUM_PREFIX = "sha256:"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsFiles:
    """A checkpoint in safetensors files.

    Args:
        path: what the user named, the folder or the file.
        files: the files that hold the tensors.

    Raises:
        CheckpointError: if a file is damaged.
    """

    format = "safetensors"

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, tuple(files)
        self.config = read_config(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.checksums: dict[str, str] = {}
        self.file_of: dict[str, Path] = {}
        for file in files:
            self._list(file)

    def _list(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                for key, value in (opened.metadata() or {}).items():
                    if key.startswith(CHECKSUM_PREFIX):
                        self.checksums[key.removeprefix(CHECKSUM_PREFIX)] = value
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    entry = opened.get_slice(name)
                    dtype = entry.get_dtype()
                    if dtype not in DTYPES:
                        raise CheckpointError(f"{file}: tensor {name!r} has dtype {dtype}, which PyTorch does not read")
                    self.tensors[name] = TensorInfo(tuple(entry.get_shape()), DTYPES[dtype])
                    self.file_of[name] = file
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is no complete safetensors file ({error}): fetch or convert it again"
            ) from None

    def load(self, name: str) -> Tensor:
        """One tensor, its checksum verified if its file has one."""
        file = self.file_of[name]
        # Opened anew for each tensor: the mapping, whose pages count as resident, goes with the tensor.
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        expected = self.checksums.get(name)
        if expected is not None and hashlib.sha256(tensor_bytes(tensor)).hexdigest() != expected:
            raise CheckpointError(
                f"{file}: tensor {name!r} does not match its checksum, the file is damaged: fetch or convert it again"
            )
        return tensor

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in its file."""
        return self.tensors[name].nbytes

    def save_companions(self, folder: Path) -> None:
        """Copy what lies beside the weights."""
        for file in companion_files(self.path):
            shutil.copyfile(file, folder / file.name)
