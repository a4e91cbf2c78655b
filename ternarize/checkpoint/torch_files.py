"""Files of torch.save: .pt, .pth and .bin, alone or as the shards of an index, read without running their pickles."""

import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.checkpoint.safetensors_files import DTYPES
from ternarize.checkpoint.source import TensorInfo, companion_files, read_config
from ternarize.errors import CheckpointError

#: Where training scripts put the model in a dictionary of other things.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")

#: How torch.save began before PyTorch 1.6: a bare pickle. Since then it writes a zip archive, which can be mapped.
LEGACY = b"\x80\x02"

SUPPORTED = frozenset(DTYPES.values())


class TorchFiles:
    """A state_dict in files of torch.save.

    The files are mapped, not read: pages come into memory when a tensor is used, and the system may drop them again.
    Only files from before PyTorch 1.6 are read whole.

    Args:
        path: what the user named, the folder or the file.
        files: the files that hold the tensors.

    Raises:
        CheckpointError: for a file that is damaged, holds no tensors by name, or would run code.
    """

    format = "torch"

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self.config = read_config(path)
        self._mapped: dict[str, Tensor] = {}
        for file in files:
            self._mapped.update(_state_dict(file))
        self.tensors = {name: TensorInfo.of(tensor) for name, tensor in self._mapped.items()}

    def load(self, name: str) -> Tensor:
        """One tensor, a view of its file."""
        return self._mapped[name]

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes in its file."""
        return self.tensors[name].nbytes

    def save_companions(self, folder: Path) -> None:
        """Copy what lies beside the weights."""
        for file in companion_files(self.path):
            shutil.copyfile(file, folder / file.name)


def _state_dict(file: Path) -> dict[str, Tensor]:
    try:
        with file.open("rb") as opened:
            mappable = opened.read(len(LEGACY)) != LEGACY
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} holds Python objects, and loading them could run any code: "
            "save the model's state_dict() alone and convert that"
        ) from None
    except OSError:
        raise
    # The unpickler raises whatever comes to it on damaged bytes: KeyError, IndexError, struct.error and more.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{file} is no complete file of torch.save ({reason}): save or fetch it again") from None
    for key in NESTED_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = (
        {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors by name: save the model's state_dict() and convert that")
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in SUPPORTED:
            kind = "without data" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise CheckpointError(f"{file}: tensor {name!r} is {kind}: save it as a dense tensor of numbers")
    return tensors
