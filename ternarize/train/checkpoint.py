"""The state of a run in one file, which is always whole: the last one or the one before."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from ternarize.checkpoint.write import new_file
from ternarize.errors import CheckpointError, out_of_memory


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write a state and put it in the place of the former one in one rename, when all of it is on disk.

    Raises:
        CheckpointError: if it cannot be written; the former one is as it was.
    """
    with new_file(file) as partial:
        try:
            torch.save(state, partial)
        # What torch says of a full disk. Given an open file instead of a path, it would end the process.
        except RuntimeError as error:
            raise CheckpointError(
                f"{file} cannot be written, its disk may be full ({error}): free some space and go on with --resume "
                "from the state before"
            ) from None


def load_checkpoint(file: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        # torch does not look at the checksums of the zip file that it writes.
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    # A damaged file raises whatever the zip and pickle readers come to.
    except Exception as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(
            f"{file} cannot be read ({error}): put it back, or start the run again in another folder"
        ) from None
    return state
