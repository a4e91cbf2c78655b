"""Opens a checkpoint of any format: by the folder's config and files, or by a file's name and first bytes."""

from pathlib import Path

from ternarize.checkpoint import bitnet
from ternarize.checkpoint.format import QUANT_METHOD
from ternarize.checkpoint.gguf_file import GgufFile
from ternarize.checkpoint.packed import PackedCheckpoint
from ternarize.checkpoint.safetensors_files import SafetensorsFiles
from ternarize.checkpoint.source import Source, files_of_index, quant_method, read_config
from ternarize.checkpoint.torch_files import TorchFiles
from ternarize.errors import CheckpointError

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
SUFFIXES = (".safetensors", ".gguf", *TORCH_SUFFIXES)

#: Names that transformers gives to the weights of a folder, in its order of preference.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


def open_checkpoint(path: str | Path) -> Source:
    """A checkpoint for reading; its tensors stay on disk until they are asked for.

    Args:
        path: a folder (config.json beside weights), or a .safetensors, .pt, .pth, .bin or .gguf file.

    Raises:
        CheckpointError: if there is none that can be read, with the reason.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give a checkpoint file or folder")
        return _open_files(path, [path])
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read, permission denied: change its mode") from None


def _open_folder(path: Path) -> Source:
    method = quant_method(read_config(path))
    if method == QUANT_METHOD:
        return PackedCheckpoint(path)
    source = _open_weights(path)
    return bitnet.BitNetFiles(source) if method == bitnet.METHOD else source


def _open_weights(path: Path) -> Source:
    for name in INDEXES:
        if (path / name).is_file():
            return _open_files(path, files_of_index(path / name))
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return _open_files(path, [path / name])
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise CheckpointError(f"{path} holds no weights: need one of {', '.join('*' + suffix for suffix in SUFFIXES)}")
    if len(files) > 1:
        raise CheckpointError(
            f"{path} holds {len(files)} files of weights and no index: name one of them, such as {files[0]}"
        )
    return _open_files(path, files)


def _open_files(path: Path, files: list[Path]) -> Source:
    suffix = files[0].suffix
    if suffix == ".gguf":
        return GgufFile(path, files[0])
    if suffix in TORCH_SUFFIXES:
        return TorchFiles(path, files)
    if suffix != ".safetensors":
        raise CheckpointError(f"{path} is no checkpoint by its name: need one of {', '.join(SUFFIXES)}, or a folder")
    source = SafetensorsFiles(path, files)
    if not source.tensors:
        raise CheckpointError(f"{path} holds no tensors: there is nothing to read")
    if any(name.endswith(".T_packed") for name in source.tensors):
        raise CheckpointError(f"{path} holds packed weights: give the folder with their config.json")
    return source
