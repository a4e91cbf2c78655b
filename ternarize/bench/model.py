"""Whole models: dense and ternary contenders of one task, each checked, then timed in turns."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ternarize.bench import turns
from ternarize.bench.llama import Config
from ternarize.bench.process import ContenderError, Process, Remote
from ternarize.bench.step import Contender, Ready, Task, Work
from ternarize.bench.turns import Entrant, take_turns, until_interrupt
from ternarize.config import Kernels, TernaryConfig

Start = Callable[[Task, Path | None], Remote]


def _start(task: Task, caches: Path | None) -> Remote:
    return Process(Contender, task, caches)


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
class Result(turns.Result[Ready]):
    """One contender at one batch size. What was not measured is None."""

    cold_seconds: float | None = None
    """First call with empty caches of the compilers."""
    prewarmed_seconds: float | None = None
    """First call of a second process, with the caches that the first one left."""


def measure_batch(plan: Plan, batch: int, start: Start = _start) -> list[Result]:
    """Check and time every contender of a plan at one batch size.

    They are made at the same time, unless their start is timed; then they take turns.

    Args:
        plan: what to measure.
        batch: sequences.
        start: makes a contender; a process by default.
    """
    results = [Result(contender=name, batch=batch, tokens=plan.task(name, batch).tokens) for name in plan.contenders]
    with (
        until_interrupt(results),
        tempfile.TemporaryDirectory(prefix="ternarize-bench-", ignore_cleanup_errors=True) as folder,
    ):
        caches = {
            name: Path(folder, str(place)) if plan.start_times else None for place, name in enumerate(plan.contenders)
        }
        entrants = (
            Entrant(result, start(plan.task(result.contender, batch), caches[result.contender])) for result in results
        )
        take_turns(entrants, plan.seconds, at_once=not plan.start_times)
        if plan.start_times:
            for result in results:
                if result.ready is not None:
                    again = start(plan.task(result.contender, batch), caches[result.contender])
                    result.prewarmed_seconds = _first_call_seconds(again)
    if plan.start_times:
        for result in results:
            result.cold_seconds = None if result.ready is None else result.ready.first_call_seconds
    return results


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
