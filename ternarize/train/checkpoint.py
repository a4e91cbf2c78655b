"""The state of a run in one file, which is always whole: the last one or the one before."""

import os
from pathlib import Path
from typing import Any

import torch

from ternarize.checkpoint.write import sync
from ternarize.errors import CheckpointError


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write a state and put it in the place of the former one in one rename, when all of it is on disk."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        torch.save(state, partial)
        sync(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    sync(file.parent)


def load_checkpoint(file: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file raises whatever the zip and pickle readers come to.
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({error}): start the run again in another folder") from None
    return state
