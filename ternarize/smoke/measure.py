"""Times, memory and loss of the smoke model, and proof that its ternary layers hold integers only."""

import contextlib
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.backends import ternary
from ternarize.config import Kernels, eager_kernels, kernels_policy
from ternarize.explain import explain
from ternarize.layer import ternary_layers
from ternarize.optim import build_optimizer

#: Calls whose median is the warm time.
WARM_CALLS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one part of a step."""

    cold: float
    """The first call: compilation, and the first allocation of everything."""
    warm: float
    """Median of the calls after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one way to run the model did."""

    kernels: dict[str, int]
    """How many layers each kernel ran; empty where nothing was compiled."""
    forward: Timing
    backward_update: Timing | None
    cuda_peak_bytes: int | None
    loss: float
    """Of the last call."""
    finite: bool
    """Whether the loss of every call was."""


@dataclasses.dataclass(frozen=True)
class FloatState:
    """Floating-point tensors of a model with ternary layers."""

    trainable_parameters: int
    """Numbers in trainable float parameters, in the whole model."""
    in_ternary_parameters: int
    """Float parameters inside ternary layers."""
    in_ternary_buffers: int
    """Float buffers inside ternary layers."""

    @classmethod
    def of(cls, model: nn.Module) -> "FloatState":
        """Count them."""
        layers = [layer for _, layer in ternary_layers(model)]
        return cls(
            sum(p.numel() for p in model.parameters() if p.is_floating_point() and p.requires_grad),
            sum(p.is_floating_point() for layer in layers for p in layer.parameters()),
            sum(b.is_floating_point() for layer in layers for b in layer.buffers()),
        )


def measure(
    model: nn.Module, tokens: Tensor, *, backward: bool, compiled: bool, kernels: Kernels | None = None
) -> Measurement:
    """Call a model a few times, each time with an update if ``backward``. The model itself stays as it is.

    Args:
        model: from tokens to a loss, with trainable ternary layers, on its device.
        tokens: its input, there too.
        backward: train; else the forward pass is that of inference.
        compiled: run through torch.compile.
        kernels: which, in graphs and in the optimizer; None: as TERNARIZE_BACKEND says.

    Raises:
        KernelError: if the kernels that are asked for cannot run here, wrapped by Dynamo where ``compiled``.
    """
    device, cuda = tokens.device, tokens.is_cuda
    kernels = kernels_policy(kernels)
    model = copy.deepcopy(model).train(backward)
    optimizer = build_optimizer(model, torch.optim.AdamW, lr=2e-3, ternary={"skip_nonfinite": True})
    run: Callable[[Tensor], Any] = model
    if compiled:
        torch._dynamo.reset()
        # The function, not its name: that is known of installed packages only.
        run = torch.compile(model, backend=ternary, options={"kernels": kernels})
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def update(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    forwards, updates, losses = [], [], []
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    # The optimizer's step is in no graph.
    with eager_kernels(kernels):
        for _ in range(1 + WARM_CALLS):
            with torch.set_grad_enabled(backward), autocast:
                loss, seconds = _timed(functools.partial(run, tokens), cuda=cuda)
            forwards.append(seconds)
            if backward:
                _, seconds = _timed(functools.partial(update, loss), cuda=cuda)
                updates.append(seconds)
            losses.append(loss.detach())
    return Measurement(
        kernels=explain(model).kernels("training" if backward else "inference"),
        forward=_timing(forwards),
        backward_update=_timing(updates) if backward else None,
        cuda_peak_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        loss=losses[-1].item(),
        finite=bool(torch.stack(losses).isfinite().all()),
    )


def _timed(call: Callable[[], Any], *, cuda: bool) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _timing(seconds: list[float]) -> Timing:
    return Timing(cold=seconds[0], warm=statistics.median(seconds[1:]))
