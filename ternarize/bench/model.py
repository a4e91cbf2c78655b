"""Whole models: dense and ternary contenders of one task, each checked, then timed in turns."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ternarize.bench.llama import Config
from ternarize.bench.process import ContenderError, Process, Remote
from ternarize.bench.step import Ready, Stretch, Task, Work
from ternarize.bench.timing import MIN_ROUNDS
from ternarize.config import Kernels, TernaryConfig

#: The name of the contender that times are compared with.
DENSE = "dense"

Start = Callable[[Task, Path | None], Remote]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how."""

    work: Work
    config: Config
    """Of the model, as in config.json."""
    contenders: dict[str, tuple[TernaryConfig | None, Kernels]]
    """By name: what the linear layers are made of, None for dense, and the kernels of ternary ones."""
    prompt: int
    new_tokens: int
    dtype: torch.dtype
    device: torch.device
    seconds: float
    """Of timed rounds for one batch size, all contenders together."""
    start_times: bool
    """Whether to time the first call twice: with empty caches of the compilers, and in a new process with full ones."""

    def task(self, name: str, batch: int) -> Task:
        """What a contender has to do."""
        ternary, kernels = self.contenders[name]
        return Task(
            work=self.work,
            config=self.config,
            ternary=ternary,
            kernels=kernels,
            batch=batch,
            prompt=self.prompt,
            new_tokens=self.new_tokens,
            dtype=self.dtype,
            device=self.device,
        )


@dataclasses.dataclass(kw_only=True)
class Result:
    """One contender at one batch size. What was not measured is None."""

    contender: str
    batch: int
    tokens: int
    """Of a step."""
    status: Literal["ok", "wrong", "failed"] = "ok"
    reason: str = ""
    """Why it is not ok."""
    ready: Ready | None = None
    seconds: float | None = None
    """Of a step, the median."""
    spread: float | None = None
    """Distance of the quartiles, relative to the median."""
    device_seconds: float | None = None
    """Of a step on the device alone, the median."""
    peak_bytes: int | None = None
    cold_seconds: float | None = None
    """First call with empty caches of the compilers."""
    prewarmed_seconds: float | None = None
    """First call of a second process, with the caches that the first one left."""


class _Entrant:
    """A contender in the running; what it raises becomes its result, and it takes no further part."""

    def __init__(self, result: Result, remote: Remote) -> None:
        self.result, self._remote = result, remote

    def ask(self, method: str) -> None:
        if self.result.status != "failed":
            self._remote.ask(method)

    def answer(self) -> Any:
        """None if it has failed."""
        if self.result.status == "failed":
            return None
        try:
            return self._remote.answer()
        except ContenderError as error:
            self.result.status, self.result.reason = "failed", str(error)
            return None

    def close(self) -> None:
        self._remote.close()


def measure_batch(plan: Plan, batch: int, start: Start = Process) -> list[Result]:
    """Check and time every contender of a plan at one batch size.

    They are made at the same time, unless their start is timed; then they take turns.

    Args:
        plan: what to measure.
        batch: sequences.
        start: makes a contender; a process by default.
    """
    results = [Result(contender=name, batch=batch, tokens=plan.task(name, batch).tokens) for name in plan.contenders]
    with tempfile.TemporaryDirectory(prefix="ternarize-bench-", ignore_cleanup_errors=True) as folder:
        caches = {
            name: Path(folder, str(place)) if plan.start_times else None for place, name in enumerate(plan.contenders)
        }
        entrants = [
            _Entrant(result, start(plan.task(result.contender, batch), caches[result.contender])) for result in results
        ]
        try:
            _prepare(entrants, at_once=not plan.start_times)
            _time([entrant for entrant in entrants if entrant.result.status == "ok"], plan.seconds)
        finally:
            for entrant in entrants:
                entrant.close()
        if plan.start_times:
            for result in results:
                if result.ready is not None:
                    result.cold_seconds = result.ready.first_call_seconds
                    again = start(plan.task(result.contender, batch), caches[result.contender])
                    result.prewarmed_seconds = _first_call_seconds(again)
    return results


def _prepare(entrants: Sequence[_Entrant], *, at_once: bool) -> None:
    if at_once:
        for entrant in entrants:
            entrant.ask("prepare")
    for entrant in entrants:
        if not at_once:
            entrant.ask("prepare")
        ready: Ready | None = entrant.answer()
        if ready is not None:
            entrant.result.ready = ready
            _judge(entrant.result, ready.error, ready.allowed_error, "in the first calls")


def _judge(result: Result, error: float, allowed: float, when: str) -> None:
    # Written so that NaN fails.
    if not error <= allowed:
        result.status, result.seconds = "wrong", None
        result.reason = f"relative error {error:.1e} {when}, allowed is {allowed:.1e}"


def _time(entrants: Sequence[_Entrant], seconds: float) -> None:
    """Rounds of one stretch each, then the check again: what the timed calls computed must have been right too."""
    stretches: dict[str, list[Stretch]] = {entrant.result.contender: [] for entrant in entrants}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while entrants and (rounds < MIN_ROUNDS or time.perf_counter() < deadline):
        rounds += 1
        for entrant in entrants:
            entrant.ask("run")
            stretch: Stretch | None = entrant.answer()
            if stretch is not None:
                stretches[entrant.result.contender].append(stretch)
    for entrant in entrants:
        result = entrant.result
        entrant.ask("check")
        error: float | None = entrant.answer()
        entrant.ask("peak_bytes")
        result.peak_bytes = entrant.answer()
        if error is None or result.ready is None:
            continue
        samples = [stretch.seconds for stretch in stretches[result.contender]]
        first, result.seconds, third = statistics.quantiles(samples, n=4)
        result.spread = (third - first) / result.seconds
        on_device = [s.device_seconds for s in stretches[result.contender] if s.device_seconds is not None]
        result.device_seconds = statistics.median(on_device) if on_device else None
        _judge(result, error, result.ready.allowed_error, "after the timed calls")


def _first_call_seconds(remote: Remote) -> float | None:
    try:
        remote.ask("prepare")
        ready: Ready = remote.answer()
    except ContenderError:
        return None
    else:
        return ready.first_call_seconds
    finally:
        remote.close()


def times_dense(result: Result, results: Sequence[Result]) -> float | None:
    """Tokens a second in times of the dense contender's."""
    dense = next((other.seconds for other in results if other.contender == DENSE), None)
    return None if dense is None or result.seconds is None else dense / result.seconds
