"""The same numbers in every run on the same machine: torch's deterministic algorithms, for as long as a run takes."""

import contextlib
import os
from collections.abc import Iterator

import torch

from ternarize.errors import ConfigError


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only, without which a resumed run on a GPU differs in its last bits.

    Args:
        enabled: False changes nothing.

    Raises:
        ConfigError: where an operation has no deterministic form.
    """
    if not enabled:
        yield
        return
    # cuBLAS reads it when it is first used, and torch refuses to multiply without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    former = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Reading uninitialised memory is a bug, which filling it would only hide, at the cost of writing it all.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            raise ConfigError(f"{str(error).partition(',')[0]}: train with --no-deterministic") from error
        raise
    finally:
        torch.use_deterministic_algorithms(former)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
