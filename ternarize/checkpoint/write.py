"""Writes checkpoints: a folder appears whole or not at all, and tensors go to their shards one at a time."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize.checkpoint.safetensors_files import CHECKSUM_PREFIX, DTYPES, tensor_bytes
from ternarize.checkpoint.source import CONFIG_FILE, TensorInfo
from ternarize.errors import CheckpointError, ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse_size(size: str | int) -> int:
    """Bytes of a size like '5GB' (decimal), '4GiB' (binary) or 1000000.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"size {size!r} is not understood: use a number of bytes, or one with KB, MB, GB or GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def check_destination(destination: Path, *, force: bool, source: Path | None = None) -> None:
    """Refuse a destination that would cost the user something.

    Args:
        destination: folder to be written.
        force: whether an existing folder may be replaced.
        source: what is read to write it; it must never be inside of what is replaced.

    Raises:
        CheckpointError: if the destination exists and is not ours to replace.
    """
    if destination.is_file():
        raise CheckpointError(f"{destination} is a file: name a folder to write to")
    if source is not None and source.resolve().is_relative_to(destination.resolve()):
        raise CheckpointError(f"{destination} holds the source {source}: name another folder to write to")
    if not destination.exists() or not any(destination.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{destination} exists: name another folder, or replace it with --force (force=True)")
    if not (destination / CONFIG_FILE).is_file():
        raise CheckpointError(f"{destination} exists and is no checkpoint: remove it yourself, or name another folder")


@contextlib.contextmanager
def new_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write to, which becomes ``destination`` when the block ends well and vanishes when it does not.

    It lies beside the destination, on the same file system, so that the last step is a rename. Every file is synced
    before it. A folder that is replaced is moved aside first and removed last.
    """
    check_destination(destination, force=force)
    with named(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        target = destination.resolve()
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        partial.mkdir()
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            if target.exists():
                target.rename(replaced)
            try:
                partial.rename(target)
            except OSError:
                if replaced.exists():
                    replaced.rename(target)
                raise
            sync(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def new_file(destination: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``destination`` in one rename when all of it is on disk."""
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    with named(destination):
        try:
            yield partial
            sync(partial)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)
        sync(destination.parent)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Put a name into errors of the system that have none: writing to a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object as people read it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class ShardWriter:
    """Safetensors files whose tensors are written one at a time, in any order, with their checksums.

    All shapes are known at the start, and a checksum has a known length: so the place of every byte is known, and a
    tensor goes there at once. Within a shard, wide dtypes come first, which keeps every tensor aligned.

    Args:
        folder: to write to.
        stem: of the file names: <stem>.safetensors, or <stem>-00001-of-00003.safetensors and so on with their index.
        tensors: what will be written.
        max_shard_bytes: shards are no larger, unless a single tensor is.
    """

    def __init__(self, folder: Path, stem: str, tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> None:
        self._folder, self._stem, self._tensors = folder, stem, tensors
        shards: list[list[str]] = [[]]
        size = 0
        for name, info in tensors.items():
            if shards[-1] and size + info.nbytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += info.nbytes
        self._shards: dict[Path, list[str]] = {}
        self._file_of: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self._checksums: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            label = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
            file = folder / f"{stem}{label}.safetensors"
            self._shards[file] = sorted(names, key=lambda name: -tensors[name].dtype.itemsize)
            self._file_of |= dict.fromkeys(names, file)
            self._lay_out(file)

    def _lay_out(self, file: Path) -> None:
        header = self._header(file)
        offset = len(header)
        for name in self._shards[file]:
            self._offsets[name] = offset
            offset += self._tensors[name].nbytes
        file.write_bytes(header)
        os.truncate(file, offset)

    def _header(self, file: Path) -> bytes:
        """Length and JSON of a shard's header; checksums that are not known yet are zeros."""
        names = self._shards[file]
        checksums = {CHECKSUM_PREFIX + name: self._checksums.get(name, "0" * 64) for name in names}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **checksums}}
        start = 0
        for name in names:
            info = self._tensors[name]
            end = start + info.nbytes
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place."""
        tensor = tensor.detach().cpu()
        assert TensorInfo.of(tensor) == self._tensors[name], f"{name} is {TensorInfo.of(tensor)}"
        content = tensor_bytes(tensor)
        with self._file_of[name].open("r+b") as file:
            file.seek(self._offsets[name])
            file.write(content)
        self._checksums[name] = hashlib.sha256(content).hexdigest()

    def finish(self) -> None:
        """Write the checksums and, for several shards, the index."""
        unwritten = self._tensors.keys() - self._checksums.keys()
        assert not unwritten, f"never written: {sorted(unwritten)}"
        for file in self._shards:
            with file.open("r+b") as opened:
                opened.write(self._header(file))
        if len(self._shards) > 1:
            total = sum(info.nbytes for info in self._tensors.values())
            weight_map = {name: self._file_of[name].name for name in self._tensors}
            write_json(
                self._folder / f"{self._stem}.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
