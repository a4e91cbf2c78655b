"""Training steps of whole models: dense and ternary contenders, each checked, then timed in turns."""

import dataclasses
from collections.abc import Callable

import torch

from ternarize.bench.llama import Config
from ternarize.bench.process import Process, Remote
from ternarize.bench.train_step import Contender, Ready, Task
from ternarize.bench.turns import Entrant, Result, take_turns, until_interrupt
from ternarize.config import Kernels, TernaryConfig
from ternarize.layer import Apply

Start = Callable[[Task], Remote]


def _start(task: Task) -> Remote:
    return Process(Contender, task)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and how."""

    config: Config
    """Of the model, as in config.json."""
    contenders: dict[str, tuple[TernaryConfig | None, Kernels, Apply]]
    """By name: what the linear layers are made of, None for dense; kernels and ``apply`` of ternary ones."""
    batch: int
    ctx: int
    checkpointing: bool
    device: torch.device
    trace_memory: bool
    """As of `Task`."""
    seconds: float
    """Of timed rounds, all contenders together."""

    def task(self, name: str) -> Task:
        """What a contender has to do."""
        ternary, kernels, apply = self.contenders[name]
        return Task(
            config=self.config,
            ternary=ternary,
            kernels=kernels,
            apply=apply,
            batch=self.batch,
            ctx=self.ctx,
            checkpointing=self.checkpointing,
            trace_memory=self.trace_memory,
            device=self.device,
        )


def measure_training(plan: Plan, start: Start = _start) -> list[Result[Ready]]:
    """Check and time every contender of a plan.

    They prepare one after the other, because a check needs much memory, and compilers the processors; then they take
    turns.

    Args:
        plan: what to measure.
        start: makes a contender; a process by default.
    """
    results: list[Result[Ready]] = [
        Result(contender=name, batch=plan.batch, tokens=plan.task(name).tokens) for name in plan.contenders
    ]
    with until_interrupt(results):
        entrants = (Entrant(result, start(plan.task(result.contender))) for result in results)
        take_turns(entrants, plan.seconds, at_once=False)
    return results


def teraflops(result: Result[Ready]) -> float | None:
    """10^12 operations a second: 6 a weight and token, 2 in forward and 4 in backward, without attention."""
    if result.ready is None or result.seconds is None:
        return None
    return 6 * result.ready.weights * result.tokens / result.seconds / 1e12
