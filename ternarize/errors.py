"""What ternarize raises. Every message says what was got, what is needed and what to do about it."""

import torch


class TernarizeError(Exception):
    """Base of every error that ternarize raises on purpose."""


class ConfigError(TernarizeError, ValueError):
    """An option, an environment variable or a combination of them that means nothing."""


class ShapeError(TernarizeError, ValueError):
    """A tensor whose shape or dtype does not fit the layer, the format or the kernel."""


class ConversionError(TernarizeError, RuntimeError):
    """A model or checkpoint that cannot be made ternary."""


class CheckpointError(TernarizeError, RuntimeError):
    """A file or folder that is no readable checkpoint, or one that must not be overwritten."""


class KernelError(TernarizeError, RuntimeError):
    """A kernel that was asked for by name and cannot run here."""


class NonFiniteError(TernarizeError, ArithmeticError):
    """NaN or Inf where a finite number is needed; integer state was left as it was."""


def cause_of(error: BaseException) -> BaseException:
    """What was raised inside torch.compile, which wraps the errors of its backends."""
    # Dynamo takes a second to import.
    from torch._dynamo.exc import BackendCompilerFailed

    while isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    return error


def one_line(error: BaseException) -> str:
    """What an error of others is and says, as far as that fits a line."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full: `ternarize.cli.main` reports those, whatever was being done."""
    # On the CPU it is a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
