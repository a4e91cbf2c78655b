"""Checkpoints of transformers' quant_method "bitnet": packed trits and one scale a matrix, read as exact floats."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.checkpoint.source import Source, TensorInfo
from ternarize.errors import CheckpointError

METHOD = "bitnet"

#: Trits of a byte: of one column, and of rows a quarter of the matrix apart.
_ROWS = 4


class BitNetFiles:
    """A folder whose linear layers transformers packed (`transformers.integrations.bitnet`).

    A matrix of N rows lies in N / 4: bits 2i and 2i + 1 of row r are the trit of row i · N / 4 + r, plus 1. Its
    ``weight_scale`` multiplies what an ``autobitlinear`` gives, and divides what a ``bitlinear`` gives, the default.
    Each comes out as trits times that factor, in the dtype of the scale, or in float32 if the scale divides: few
    reciprocals are exact in fewer bits.

    Args:
        files: the tensors as they are stored, with the folder's config.json.

    Raises:
        CheckpointError: if layers are more than a packed matrix: with a norm of their own, or rounded as they run.
    """

    format = METHOD

    def __init__(self, files: Source) -> None:
        config: dict[str, Any] = dict(files.config or {})
        quantization = config.pop("quantization_config")
        if quantization.get("use_rms_norm"):
            raise CheckpointError(
                f"{files.path} has a norm in each of its linear layers (use_rms_norm), which ternary layers have not: "
                "it cannot be converted"
            )
        if quantization.get("quantization_mode", "offline") != "offline":
            raise CheckpointError(
                f"{files.path} holds weights that are rounded while the model runs: convert it as a dense checkpoint, "
                "without its quantization_config"
            )
        self.path: Path = files.path
        self.config: dict[str, Any] | None = config
        self._files = files
        self._divides = quantization.get("linear_class", "bitlinear") != "autobitlinear"
        stored = files.tensors
        self._scales = {
            name: f"{name}_scale"
            for name, info in stored.items()
            if info.dtype == torch.uint8 and f"{name}_scale" in stored
        }
        self._tensors = {
            name: self._info(name, info) for name, info in stored.items() if name not in self._scales.values()
        }

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        if name not in self._scales:
            return info
        scale = self._files.tensors[self._scales[name]]
        if len(info.shape) != 2 or scale.shape not in ((), (1,)) or not scale.dtype.is_floating_point:
            raise CheckpointError(
                f"{self.path}: {name} is {info} with a scale of {scale}, need a matrix and one float: fetch it again"
            )
        rows, in_features = info.shape
        return TensorInfo((_ROWS * rows, in_features), torch.float32 if self._divides else scale.dtype)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `Source`."""
        return self._tensors

    def load(self, name: str) -> Tensor:
        """See `Source`."""
        tensor = self._files.load(name)
        if name not in self._scales:
            return tensor
        scale = self._files.load(self._scales[name]).reshape(())
        if self._divides:
            scale = scale.to(torch.float32).reciprocal()
        codes = torch.cat([tensor >> 2 * i & 3 for i in range(_ROWS)])
        if (codes == 3).any():
            raise CheckpointError(f"{self.path}: {name} holds the code 3, which is no trit: fetch it again")
        return codes.to(scale.dtype).sub_(1).mul_(scale)

    def stored_bytes(self, name: str) -> int:
        """See `Source`."""
        scale = self._scales.get(name)
        return self._files.stored_bytes(name) + (0 if scale is None else self._files.stored_bytes(scale))

    def save_companions(self, folder: Path) -> None:
        """See `Source`."""
        self._files.save_companions(folder)
