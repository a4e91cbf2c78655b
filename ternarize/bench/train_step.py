"""One contender of `ternarize bench train`: a model, its compiled training step, the check of it and its time.

A step is zero_grad, forward, the cross-entropy of the next tokens, backward and the optimizer's step, on the same batch
each time. The forward is one full graph of ``torch.compile`` under bfloat16 autocast, and it and its backward are CUDA
graphs, as by ``mode="reduce-overhead"``; float parameters are float32 and belong to fused AdamW. Nothing in it waits
for the device.
"""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ternarize.bench.allocations import allocation_trace, telling_ctx, weight_sized
from ternarize.bench.clocks import Laps, hold_device, host_seconds
from ternarize.bench.compiled import compile_step, recorded_cuda_graphs
from ternarize.bench.llama import Config, multiplied_weights, trainable_model, with_layers
from ternarize.bench.turns import Stretch, largest
from ternarize.candidates import find_dense_layers
from ternarize.checkpoint.transformers_model import empty_model
from ternarize.config import Kernels, TernaryConfig, eager_kernels
from ternarize.explain import explain
from ternarize.layer import Apply, TernaryLinear, ternary_layers
from ternarize.optim import DEFAULT_LR, build_optimizer

#: Learning rate of float parameters, and what the default rate of a rule is multiplied by: a tenth of the peaks of
#: docs/training.md, which the measured runs reached after a warm-up. Here the first step has the full rate.
FLOAT_LR, RATE = 2e-4, 0.1

#: The check against the reference: layers of the model and steps. The first step of `factored` moves no trit, it only
#: fills the statistics.
CHECKED_LAYERS, CHECKED_STEPS = 2, 3

#: First steps of the whole model, whose loss has to fall. The first compiles; from the second on nothing is new.
FIRST_STEPS = 5

#: Relative difference of a loss that is allowed between bfloat16 and float32. On two layers it is 1e-4; a loss that is
#: summed or shifted wrongly is off by far more, and what is wrong before it shows in the integers.
LOSS_TOLERANCE = 5e-3

#: Share of a layer's integers that may differ from those of the float32 reference: what differs if the reference runs
#: under bfloat16 autocast, times this factor, and never more than the bound. Gradients that bfloat16
#: has rounded make some stochastic roundings fall the other way: measured after these steps, 2 % of the integers at 256
#: features and 5 % at 32. About half of all integers move meanwhile, so that a wrong kernel is beyond the bound.
ERROR_FACTOR, LARGEST_ERROR = 2.0, 0.2

#: Timed steps of a stretch, once by the host's clock and once by the device's.
STRETCH_STEPS = 3

#: Parts of a step between two marks, in their order.
_PARTS = ("update", "forward", "backward", "update")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender has to do."""

    config: Config
    """Of the model, as in config.json."""
    ternary: TernaryConfig | None
    """What its linear layers are made of; None for a dense model, which Inductor compiles."""
    kernels: Kernels
    """Of a ternary model."""
    apply: Apply
    """When a ternary model's integers change: as of `ternarize.TernaryOptimizer`."""
    batch: int
    """Sequences."""
    ctx: int
    """Tokens of each."""
    checkpointing: bool
    """Whether each block of the model keeps its input only, and is run again in backward."""
    trace_memory: bool
    """Whether to look for allocations as large as a float matrix of a ternary layer; on a GPU."""
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.ctx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known of a contender before its time."""

    losses: list[float]
    """Of the first steps, in nats."""
    loss_error: float
    """Of the compiled step on the model cut short, relative to float32 in eager mode: the largest of a few steps."""
    integer_error: float | None
    """Share of integers that differ there after these steps, in the ternary layer with the most; None for dense."""
    allowed_integer_error: float | None
    graph_breaks: int
    cuda_graphs: bool
    """Whether forward and backward were recorded as CUDA graphs."""
    kernels: dict[str, int]
    """How many ternary layers each kernel runs."""
    weights: int
    """That each token is multiplied with."""
    bytes_a_weight: float
    """Weights, gradients and optimizer state of the layers that are or would be ternary, counted after a step."""
    first_step_seconds: float
    """From a model in memory to its first update: everything that compiles and loads."""
    resident_bytes: int
    """Allocated on the device between steps; 0 on a CPU."""
    weight_sized_allocations: dict[str, int] | None
    """Allocations of a step of the model cut short, on other tokens, that are as large as a float matrix of a layer
    that is or would be ternary, by what they may be. None if not looked for."""

    @property
    def fault(self) -> str:
        """As of `ternarize.bench.turns.Ready`."""
        faults = []
        # Written so that NaN is one.
        if not self.loss_error <= LOSS_TOLERANCE:
            faults.append(f"loss off by {self.loss_error:.1e}, allowed is {LOSS_TOLERANCE:.1e}")
        if self.integer_error is not None and self.allowed_integer_error is not None:
            share, allowed = self.integer_error, self.allowed_integer_error
            if not share <= allowed:
                faults.append(f"{share:.1%} of a layer's integers differ, allowed are {allowed:.1%}")
        if self.graph_breaks:
            faults.append(f"{self.graph_breaks} graph breaks")
        if learning := _not_learning(self.losses):
            faults.append(learning)
        return "; ".join(faults)


class Training:
    """A model, its optimizer and its step.

    Args:
        task: what to train and how.
        config: of the model, in place of the task's.
        compiled: run through torch.compile.
        autocast: compute in bfloat16.
        cuda_graphs: replay what was compiled. What a replay allocates is not seen.
    """

    def __init__(self, task: Task, config: Config, *, compiled: bool, autocast: bool, cuda_graphs: bool = True) -> None:
        self.model = trainable_model(config, task.ternary, device=task.device)
        if task.checkpointing:
            # Releases of transformers 5 have it under one name or the other.
            model: Any = self.model
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.optimizer: Any = _optimizer(self.model, task)
        self._device, self._autocast = task.device, autocast
        generator = torch.Generator(task.device).manual_seed(1)
        shape = (task.batch, task.ctx)
        self._tokens = torch.randint(int(config["vocab_size"]), shape, device=task.device, generator=generator)
        kernels = None if task.ternary is None else task.kernels
        self._forward = compile_step(self._loss, kernels, cuda_graphs=cuda_graphs) if compiled else self._loss

    def step(self, laps: Laps | None = None) -> Tensor:
        """One step; its loss, on the device."""
        mark = laps.mark if laps is not None else lambda: None
        self.optimizer.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        mark()
        with torch.autocast(self._device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext():
            loss: Tensor = self._forward(self._tokens)
        mark()
        loss.backward()
        mark()
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.step()
        else:
            self.optimizer.step(loss=loss)
        mark()
        # A copy: the next replay writes where this one did.
        return loss.detach().clone()

    def losses(self, steps: int) -> list[float]:
        """Of some steps; read at the end."""
        return [loss.item() for loss in [self.step() for _ in range(steps)]]

    def _loss(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss


class Contender:
    """Makes the model of a task in `prepare`, which also compiles and checks its step; `run` times it.

    Between the two it gives back what memory it does not keep, so that models which take turns fit a GPU together.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        if task.device.index is not None:
            # Memory, synchronisation and events are those of the current device.
            torch.cuda.set_device(task.device)

    def prepare(self) -> Ready:
        """Check the compiled step on a short model, then make the whole one and take its first steps."""
        task = self._task
        with _kernels_of(task):
            loss_error, integer_error, allowed = _compare(task)
            allocations = _weight_sized_allocations(task) if task.trace_memory else None
            counters.clear()
            self._training = Training(task, task.config, compiled=True, autocast=True)
            losses: list[float] = []
            first_step_seconds = host_seconds(lambda: losses.extend(self._training.losses(1)), task.device)
            losses += self._training.losses(FIRST_STEPS - 1)
        self._first_loss = losses[0]
        _release(task.device)
        if task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = self._training.model
        return Ready(
            losses=losses,
            loss_error=loss_error,
            integer_error=integer_error,
            allowed_integer_error=allowed,
            graph_breaks=sum(counters["graph_break"].values()),
            cuda_graphs=recorded_cuda_graphs(),
            kernels=explain(model).kernels("training") if task.ternary is not None else {},
            weights=multiplied_weights(task.config),
            bytes_a_weight=bytes_a_weight(model, self._training.optimizer),
            first_step_seconds=first_step_seconds,
            resident_bytes=torch.cuda.memory_allocated() if task.device.type == "cuda" else 0,
            weight_sized_allocations=allocations,
        )

    def run(self) -> Stretch:
        """Time a few steps."""
        device = self._task.device
        with _kernels_of(self._task):
            # Takes back the memory that it gave to the others.
            self._training.step()
            seconds = host_seconds(self._go, device) / STRETCH_STEPS
            # A step ahead is enough: the queue of a GPU holds a thousand kernels, about as many as a step.
            hold_device(seconds, device)
            laps = Laps(device)
            laps.mark()
            self._go(laps)
            parts = laps.seconds()
        phases = dict.fromkeys(("forward", "backward", "update"), 0.0)
        for i, part in enumerate(parts):
            phases[_PARTS[i % len(_PARTS)]] += part / STRETCH_STEPS
        _release(device)
        return Stretch(
            seconds=seconds,
            device_seconds=sum(parts) / STRETCH_STEPS if device.type == "cuda" else None,
            phases=phases,
        )

    def check(self) -> str:
        """What is wrong with the steps so far; empty if nothing is."""
        skipped = getattr(self._training.optimizer, "skipped_steps", 0)
        return f"{skipped} steps refused" if skipped else _not_learning([self._first_loss, self._last_loss.item()])

    def peak_bytes(self) -> int:
        """The most that was held of the device since the first steps, where CUDA graphs work included; 0 on a CPU."""
        return torch.cuda.max_memory_reserved() if self._task.device.type == "cuda" else 0

    def _go(self, laps: Laps | None = None) -> None:
        for _ in range(STRETCH_STEPS):
            self._last_loss = self._training.step(laps)


def _optimizer(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    config = task.ternary
    if config is None:
        return torch.optim.AdamW(model.parameters(), lr=FLOAT_LR, fused=True)
    update = {"lr": RATE * DEFAULT_LR[config.form], "apply": task.apply, "skip_nonfinite": True}
    return build_optimizer(model, torch.optim.AdamW, lr=FLOAT_LR, fused=True, ternary=update)


def _kernels_of(task: Task) -> contextlib.AbstractContextManager[None]:
    """The kernels of a task outside of graphs too. Who measures TileLang in training wants it there."""
    return eager_kernels(task.kernels, tilelang_training=task.kernels == "tilelang")


def _compare(task: Task) -> tuple[float, float | None, float | None]:
    """Errors of the compiled step on the first layers of the model, as in `Ready`."""
    config = _cut_short(task.config)
    # Compiled or not, under autocast or not.
    runs = [(False, False), (True, True)] if task.ternary is None else [(False, False), (False, True), (True, True)]
    losses, integers = [], []
    for compiled, autocast in runs:
        with _kernels_of(task) if compiled else eager_kernels("torch"):
            training = Training(task, config, compiled=compiled, autocast=autocast)
            losses.append(training.losses(CHECKED_STEPS))
        integers.append([layer for _, layer in ternary_layers(training.model)])
        del training
        torch._dynamo.reset()
        _release(task.device)
    loss_error = largest(abs(own / exact - 1) for own, exact in zip(losses[-1], losses[0], strict=True))
    if task.ternary is None:
        return loss_error, None, None
    exact, rounded, own_integers = integers
    allowed = min(ERROR_FACTOR * _share_that_differs(rounded, exact), LARGEST_ERROR)
    return loss_error, _share_that_differs(own_integers, exact), allowed


def _cut_short(config: Config) -> Config:
    return with_layers(config, min(CHECKED_LAYERS, int(config["num_hidden_layers"])))


def _weight_sized_allocations(task: Task) -> dict[str, int]:
    """As in `Ready`."""
    config = _cut_short(task.config)
    found = find_dense_layers(empty_model(config), include=None, exclude=None, filter_fn=None)
    shapes = {(layer.weight.shape[0], layer.weight.shape[1]) for layer in found if layer.skip is None}
    task = dataclasses.replace(task, ctx=telling_ctx(task.ctx, shapes))
    training = Training(task, config, compiled=True, autocast=True, cuda_graphs=False)
    # The first compiles, and makes what is kept: workspaces of cuBLAS, state of AdamW.
    training.losses(2)
    trace = allocation_trace(training.step)
    del training
    torch._dynamo.reset()
    _release(task.device)
    return weight_sized(trace, shapes)


def _share_that_differs(layers: Sequence[TernaryLinear], expected: Sequence[TernaryLinear]) -> float:
    """Of the integers of a layer, for the layer with the largest share."""
    shares = []
    for layer, other in zip(layers, expected, strict=True):
        pairs = list(zip(layer.parameters(), other.parameters(), strict=True))
        shares.append(sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs))
    return max(shares)


def bytes_a_weight(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of weights, gradients and optimizer state, a weight, over the layers that are or would be ternary.

    Args:
        model: after a step, before its gradients are dropped.
        optimizer: that took the step.
    """
    layers: list[Any] = [layer for _, layer in ternary_layers(model)]
    if not layers:
        found = find_dense_layers(model, include=None, exclude=None, filter_fn=None)
        layers = [layer.module for layer in found if layer.skip is None]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    tensors: list[Any] = []
    for layer in layers:
        # Ternary layers keep what lives between backward and update as plain attributes.
        tensors += [*layer.parameters(), *layer.buffers(), *vars(layer).values()]
        for parameter in layer.parameters():
            tensors += [parameter.grad, *optimizer.state.get(parameter, {}).values()]
    # What several tensors share is counted once.
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return float(stored / weights)


def _not_learning(losses: Sequence[float]) -> str:
    """What is wrong with losses of steps on one batch; empty if they are finite and fall."""
    # Of NaN, no comparison holds.
    if all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]:
        return ""
    return f"the loss on one batch went from {losses[0]:.4g} to {losses[-1]:.4g}: it must be finite and fall"


def _release(device: torch.device) -> None:
    """Give unused memory of a GPU back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
