"""Every kernel that a model's ternary layers need, found without running the model and built before its first call."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import torch

from ternarize import ops
from ternarize.activation import quantize_activation
from ternarize.backends.compiler import checks_finite
from ternarize.backends.select import Choice, Facts, choose
from ternarize.calls import Call
from ternarize.config import Kernels

if TYPE_CHECKING:
    # TileLang takes a second to import, and is for Linux.
    from ternarize.backends.tilelang.build import Program


@dataclasses.dataclass(frozen=True)
class PlannedCall:
    """A call of a model and what runs it in an inference graph."""

    call: Call
    choice: Choice
    programs: "dict[Program, list[int]]"
    """Of TileLang, each with the token counts that it serves; none if another backend was chosen."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What became of one program."""

    program: "Program"
    compiled: bool
    """False if the kernel was in TileLang's cache."""
    error: str | None = None


def plan_call(
    call: Call, tokens: Iterable[int], dtype: torch.dtype, policy: Kernels, capability: tuple[int, int]
) -> PlannedCall:
    """Choose the kernels of a call as a compiled graph would.

    Args:
        call: layers that share their input.
        tokens: numbers of input rows that there must be kernels for.
        dtype: of the input.
        policy: which kernels to use.
        capability: of the GPU, which need not be here.

    Raises:
        KernelError: if the policy forces a backend that cannot run the call.
    """
    first = call[0].empty(device="meta")
    facts = Facts(
        device="cuda",
        capability=capability,
        dtype=dtype,
        in_features=first.in_features,
        out_features=tuple(layer.out_features for layer in call),
        planes=tuple(layer.config.planes for layer in call),
        group_size=first.group_size,
        mantissas=tuple(None if layer.mantissa is None else layer.mantissa.dtype for layer in call),
    )
    stem = ops.LINEAR_STEM[first.activation]
    choice = choose(stem, "inference", facts, policy)
    programs: dict[Program, list[int]] = {}
    if choice.backend == "tilelang":
        from ternarize.backends.tilelang.host import layer_shapes
        from ternarize.backends.tilelang.linear import rounds_few
        from ternarize.backends.tilelang.programs import program_for

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        tensors = [layer.empty(device="meta") for layer in call]
        shapes = layer_shapes(*zip(*((t.T_packed, t.E_mantissa, t.bias) for t in tensors), strict=True))
        K, g = first.in_features, first.group_size
        for M in tokens:
            # Where the number of tokens is dynamic, x is rounded before the call.
            rounds = [False, True] if stem != "linear" and rounds_few(M, shapes, K, g if g > 0 else K) else [False]
            for rounded_in_call in rounds:
                program = program_for(
                    stem, M, shapes, K, g, dtype, guarded=checks_finite(), gpu=gpu, rounds=rounded_in_call
                )
                programs.setdefault(program, []).append(M)
    return PlannedCall(call, choice, programs)


def build_all(programs: "Iterable[Program]", jobs: int) -> "Iterator[Built]":
    """Compile programs, ``jobs`` at a time, for whoever asks TileLang's cache later; yields each as it is done."""
    from ternarize.backends.tilelang.build import start

    running: dict[Future[Any], Program] = {}
    for program in [*programs, None]:
        if program is not None:
            running[start(program)] = program
        # At the end all that still run, before it only what makes room.
        while running and (program is None or len(running) >= jobs):
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            yield from (_built(running.pop(future), future) for future in done)


def _built(program: "Program", future: "Future[Any]") -> Built:
    error = future.exception()
    if error is not None:
        return Built(program, compiled=False, error=f"{type(error).__name__}: {error}")
    # A kernel that was loaded has no artifact of a compilation.
    return Built(program, compiled=future.result().artifact is not None)


def default_jobs() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def warm_triton(call: Call, tokens: Iterable[int], dtype: torch.dtype) -> int:
    """Run a call in Triton kernels on this GPU, so that Triton compiles and keeps them; returns how often it ran.

    Triton compiles anew for one token, for multiples of 16, and for each size of its blocks, which follow the powers of
    two: one token count of each kind is run.
    """
    kinds = {(M == 1, M % 16 == 0, (M - 1).bit_length()): M for M in tokens}
    layers = [layer.empty(device="cuda") for layer in call]
    stem = ops.LINEAR_STEM[layers[0].activation]
    tensors = ((w.T_packed, w.E, w.E_mantissa, w.bias, w.bias_exponent) for w in layers)
    columns: list[Any] = [list(column) for column in zip(*tensors, strict=True)]
    for M in kinds.values():
        x = torch.zeros(M, layers[0].in_features, dtype=dtype, device="cuda")
        if stem == "linear":
            ops.lowered(stem, "triton")(x, *columns, layers[0].group_size)
        else:
            ops.lowered(stem, "triton")(*quantize_activation(x), *columns, layers[0].group_size, dtype)
    torch.cuda.synchronize()
    return len(kinds)
