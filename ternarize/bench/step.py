"""One contender of `ternarize bench decode` and `prefill`: a model, its compiled step, the check of it and its time.

A step of decode takes one token of each sequence to the next one; a step of prefill takes prompts to their first new
token. Both are one full graph of ``torch.compile`` with ``mode="reduce-overhead"``, which makes it one CUDA graph, over
a static cache of keys and values.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ternarize.bench.clocks import Laps, hold_device, host_seconds
from ternarize.bench.compiled import compile_step, recorded_cuda_graphs
from ternarize.bench.llama import Config, attend_causally, attend_in_groups, random_model
from ternarize.bench.turns import Stretch, largest
from ternarize.config import Kernels, TernaryConfig, eager_kernels
from ternarize.explain import explain

Work = Literal["decode", "prefill"]

#: Tokens of each sequence that the check decodes, one after the other.
CHECKED_STEPS = 4

#: Prefills of a timed stretch. The first ones run at clocks that the contender before has left: a GPU takes some tenths
#: of a second to settle at its power limit.
STRETCH_PREFILLS = 5

#: Calls before the check: Inductor runs the first, records the second as a CUDA graph and replays it from the third on.
WARM_UP_CALLS = 3

#: How much further from float32 a compiled step may be than the eager model in its own dtype, which rounds at the same
#: places or more often.
ERROR_FACTOR = 2.0

#: The largest error that is ever allowed: beyond it the eager model is no measure of what is right either.
LARGEST_ERROR = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender has to do."""

    work: Work
    config: Config
    """Of the model, as in config.json."""
    ternary: TernaryConfig | None
    """What its linear layers are made of; None for a dense model, which Inductor compiles."""
    kernels: Kernels
    """Of a ternary model."""
    batch: int
    """Sequences."""
    prompt: int
    """Tokens of each: to be read by a prefill, in the cache already for a decode."""
    new_tokens: int
    """Steps of a timed stretch of decode."""
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        """That a step takes in or makes, all sequences together."""
        return self.batch * (self.prompt if self.work == "prefill" else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known of a contender before its time."""

    first_call_seconds: float
    """From a model in memory to the tokens of the first step on the host: everything that compiles and loads."""
    error: float
    """Relative, against float32, the largest of logits, keys and values."""
    allowed_error: float
    kernels: dict[str, int]
    """How many ternary layers each kernel runs."""
    cuda_graph: bool
    """Whether a CUDA graph was recorded and nothing was left out of it."""
    resident_bytes: int
    """Allocated on the device by weights and cache; 0 on a CPU."""

    @property
    def fault(self) -> str:
        """As of `ternarize.bench.turns.Ready`."""
        return _fault(self.error, self.allowed_error)


class Contender:
    """Makes the model of a task at once; `prepare` compiles and checks its step, `run` times it.

    Raises:
        CheckpointError: if transformers is missing or has no such model.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._model = random_model(task.config, task.ternary, dtype=task.dtype, device=task.device)
        attend = attend_causally if task.work == "prefill" else attend_in_groups
        attend(self._model)
        generator = torch.Generator(task.device).manual_seed(1)
        checked = CHECKED_STEPS if task.work == "decode" else 1
        length = task.prompt if task.work == "prefill" else 1
        vocabulary = int(task.config["vocab_size"])
        self._inputs = torch.randint(vocabulary, (checked, task.batch, length), device=task.device, generator=generator)
        self._cache = self._new_cache(task.dtype)
        if task.work == "decode":
            for layer in self._cache.layers:
                layer.keys.normal_(generator=generator)
                layer.values.normal_(generator=generator)
        self._resident_bytes = _allocated(task.device)

    @torch.no_grad()
    def prepare(self) -> Ready:
        """Compile the step, call it until it is one CUDA graph, and check what that writes."""
        device = self._task.device
        # Before anything is compiled: parameters lie elsewhere afterwards.
        with eager_kernels("torch"):
            with _in_float32(self._model, self._task.dtype):
                cache = self._new_cache(torch.float32)
                for layer, own in zip(cache.layers, self._cache.layers, strict=True):
                    layer.keys.copy_(own.keys)
                    layer.values.copy_(own.values)
                self._exact = self._outputs(self._step, cache)
                del cache
            rounding = self._error(self._step)
        self._allowed = min(ERROR_FACTOR * rounding, LARGEST_ERROR)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        counters.clear()
        self._compiled = compile_step(self._step, None if self._task.ternary is None else self._task.kernels)
        start = time.perf_counter()
        for call in range(WARM_UP_CALLS):
            self._rewind(self._cache)
            self._compiled(self._inputs[0], self._cache)[0].tolist()
            if not call:
                first_call_seconds = time.perf_counter() - start
        return Ready(
            first_call_seconds=first_call_seconds,
            error=self._error(self._compiled),
            allowed_error=self._allowed,
            kernels=explain(self._model).kernels("inference") if self._task.ternary is not None else {},
            cuda_graph=recorded_cuda_graphs(),
            resident_bytes=self._resident_bytes,
        )

    @torch.no_grad()
    def check(self) -> str:
        """What is wrong with the compiled step now; empty if nothing is."""
        return _fault(self._error(self._compiled), self._allowed)

    def peak_bytes(self) -> int:
        """The most that was allocated on the device since the step was first compiled; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self._task.device.type == "cuda" else 0

    @torch.no_grad()
    def run(self) -> Stretch:
        """Time a stretch: the new tokens of every sequence, or some prefills, one after the other."""
        steps = self._task.new_tokens if self._task.work == "decode" else STRETCH_PREFILLS
        self._rewind(self._cache)
        seconds = host_seconds(lambda: self._go(steps), self._task.device)
        if self._task.device.type != "cuda":
            return Stretch(seconds=seconds / steps, device_seconds=None)
        return Stretch(seconds=seconds / steps, device_seconds=self._device_seconds(steps, seconds) / steps)

    def _device_seconds(self, steps: int, head_start: float) -> float:
        laps = Laps(self._task.device)
        self._rewind(self._cache)
        hold_device(head_start, self._task.device)
        laps.mark()
        self._go(steps)
        laps.mark()
        return laps.seconds()[0]

    def _go(self, steps: int) -> None:
        """Each step decodes what the one before has chosen, or reads the prompts again."""
        tokens = self._inputs[0]
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            # A copy: the next replay writes where this one did.
            chosen = self._compiled(tokens, self._cache)[0].clone()
            if self._task.work == "decode":
                tokens = chosen
            else:
                self._rewind(self._cache)

    def _step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """[B, L] tokens to the next ones [B, 1] and their logits [B, V]."""
        logits = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits.argmax(-1, keepdim=True), logits

    def _new_cache(self, dtype: torch.dtype) -> Any:
        from transformers import StaticCache

        task = self._task
        config: Any = self._model.config
        length = task.prompt if task.work == "prefill" else task.prompt + max(task.new_tokens, CHECKED_STEPS)
        cache = StaticCache(config=config, max_cache_len=length)
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache.early_initialization(task.batch, heads, head_dim, dtype, task.device)
        return cache

    def _rewind(self, cache: Any) -> None:
        """To the end of the prompt, or before it: what the cache holds beyond is masked."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(self._task.prompt if self._task.work == "decode" else 0)

    def _outputs(self, step: Any, cache: Any) -> list[Tensor]:
        """Logits [S, B, V] of the checked steps, and what they left in the last layer of the cache."""
        self._rewind(cache)
        logits = []
        for tokens in self._inputs:
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(step(tokens, cache)[1].clone())
        last = cache.layers[-1]
        written = self._inputs.shape[0] * self._inputs.shape[2]
        end = written + (self._task.prompt if self._task.work == "decode" else 0)
        return [torch.stack(logits), *(held[:, :, end - written : end].clone() for held in (last.keys, last.values))]

    def _error(self, step: Any) -> float:
        outputs = self._outputs(step, self._cache)
        errors = [
            float((output.double() - exact.double()).norm() / exact.double().norm())
            for output, exact in zip(outputs, self._exact, strict=True)
        ]
        return largest(errors)


def _fault(error: float, allowed: float) -> str:
    # Written so that NaN is one.
    return "" if error <= allowed else f"relative error {error:.1e}, allowed is {allowed:.1e}"


@contextlib.contextmanager
def _in_float32(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let every module compute in float32, its parameters cast while it runs: a whole copy might not fit."""

    def widen(module: nn.Module, _: Any) -> None:
        module.to(torch.float32)

    def narrow(module: nn.Module, *_: Any) -> None:
        module.to(dtype)

    hooks = []
    for module in model.modules():
        if any(parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
