"""Tokens on disk, read through a memory map, and which of them a step sees."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternarize.errors import CheckpointError, ConfigError
from ternarize.train.tokenizer import vocabulary_size

TRAIN_FILE, VALIDATION_FILE = "train.bin", "validation.bin"

#: Bytes that are read at a time.
CHUNK = 2**24

#: Without a validation text, the last part of the training text is kept for it.
VALIDATION_SHARE = 0.05

#: Windows of a validation, rounded up to whole batches.
VALIDATION_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Training and validation tokens, as memory maps of uint8, uint16 or uint32."""

    train: np.ndarray[Any, Any]
    validation: np.ndarray[Any, Any]

    def check(self, ctx: int) -> None:
        """Refuse texts that hold no window of ``ctx`` tokens and the one after them.

        Raises:
            ConfigError: if one is too short.
        """
        for name in ("train", "validation"):
            count = len(getattr(self, name))
            if count < ctx + 1:
                raise ConfigError(f"the {name} text has {count} tokens, ctx={ctx} needs {ctx + 1}: give more text")


def write_tokens(folder: Path, texts: Sequence[Path], validation: Path | None, tokenizer: Any) -> None:
    """Write the tokens of some text files to train.bin and validation.bin.

    Args:
        folder: to write to.
        texts: one after the other they are the training text.
        validation: another text; without one, the last 5 % of the training tokens are taken from it.
        tokenizer: a `tokenizers.Tokenizer`, for UTF-8 text, which is cut at line ends; None: every byte is a token.

    Raises:
        ConfigError: for a text that the tokenizer cannot take.
        OSError: for a file that cannot be read.
    """
    train, held_out = folder / TRAIN_FILE, folder / VALIDATION_FILE
    _write(train, texts, tokenizer)
    if validation is not None:
        _write(held_out, [validation], tokenizer)
    else:
        _split(train, held_out, token_dtype(tokenizer).itemsize)


def open_tokens(folder: Path, tokenizer: Any) -> Tokens:
    """Map what `write_tokens` wrote with the same tokenizer."""
    dtype = token_dtype(tokenizer)
    return Tokens(_map(folder / TRAIN_FILE, dtype), _map(folder / VALIDATION_FILE, dtype))


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of the files that `write_tokens` wrote, by their names."""
    found = {}
    for name in (TRAIN_FILE, VALIDATION_FILE):
        with (folder / name).open("rb") as file:
            found[name] = {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": file.tell(),
            }
    return found


def require_unchanged(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse tokens that are not those of before: a run that goes on with others is another one.

    Args:
        folder: with the files.
        expected: their `fingerprints` when they were written.

    Raises:
        CheckpointError: if one is missing, shorter, longer or otherwise changed.
    """
    for name, found in fingerprints(folder).items():
        if found == expected[name]:
            continue
        key = "bytes" if found["bytes"] != expected[name]["bytes"] else "sha256"
        raise CheckpointError(
            f"{folder / name} was changed since its run began, its {key} are {found[key]}, were {expected[name][key]}: "
            "put the file back, or start the run again in another folder"
        )


def token_dtype(tokenizer: Any) -> np.dtype[Any]:
    """The smallest unsigned integers that hold the tokens of a tokenizer, or bytes for None."""
    return np.min_scalar_type(255 if tokenizer is None else vocabulary_size(tokenizer) - 1)


def windows(tokens: np.ndarray[Any, Any], ctx: int, count: int, seed: int, step: int) -> Tensor:
    """The windows of a step, drawn evenly from the whole text, with replacement.

    They follow from ``seed`` and ``step`` alone, by the counter-based Philox generator, so that a resumed run needs no
    state, and every rule sees the same data.

    Args:
        tokens: the text.
        ctx: tokens a window.
        count: windows of the step, of all micro-batches.
        seed: of the run.
        step: counted from 0.

    Returns:
        int64 [count, ctx + 1]: inputs, and shifted by one the targets.
    """
    # The step in a word of its own: the generator counts blocks in the first.
    bits = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(count)
    return _gather(tokens, bits % np.uint64(len(tokens) - ctx), ctx)


def validation_windows(tokens: np.ndarray[Any, Any], ctx: int, batch: int) -> list[Tensor]:
    """The same windows each time, at even distances, in batches: int64 [batch, ctx + 1] each."""
    batches = -(-VALIDATION_WINDOWS // batch)
    starts = np.linspace(0, len(tokens) - ctx - 1, batches * batch).astype(np.uint64)
    return [_gather(tokens, part, ctx) for part in np.split(starts, batches)]


def _gather(tokens: np.ndarray[Any, Any], starts: np.ndarray[Any, Any], ctx: int) -> Tensor:
    return torch.from_numpy(np.stack([tokens[start : start + ctx + 1] for start in starts.tolist()]).astype(np.int64))


def _map(file: Path, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    # An empty file cannot be mapped.
    return np.memmap(file, dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def _write(file: Path, texts: Sequence[Path], tokenizer: Any) -> None:
    dtype = token_dtype(tokenizer)
    with file.open("wb") as out:
        for text in texts:
            for chunk in _chunks(text):
                if tokenizer is None:
                    out.write(chunk)
                    continue
                try:
                    ids = tokenizer.encode(chunk.decode("utf-8"), add_special_tokens=False).ids
                except UnicodeDecodeError as error:
                    raise ConfigError(
                        f"{text} is not UTF-8 text ({error.reason}), which a tokenizer needs: convert it, or train on "
                        "bytes without --tokenizer"
                    ) from None
                out.write(np.asarray(ids, dtype).tobytes())


def _chunks(text: Path) -> Iterator[bytes]:
    """The bytes of a file, in pieces that end at line ends."""
    with text.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk + file.readline()


def _split(train: Path, validation: Path, itemsize: int) -> None:
    """Move the last tokens of a file to another one."""
    kept = int(train.stat().st_size // itemsize * (1 - VALIDATION_SHARE)) * itemsize
    with train.open("rb") as source, validation.open("wb") as out:
        source.seek(kept)
        while chunk := source.read(CHUNK):
            out.write(chunk)
    os.truncate(train, kept)
