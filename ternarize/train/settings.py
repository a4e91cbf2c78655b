"""What decides the numbers of a training run: one frozen record, stored with the run and compared when it resumes."""

import dataclasses
import math
from typing import Literal, get_args

import torch

from ternarize.config import Accumulator, TernaryConfig
from ternarize.errors import ConfigError
from ternarize.optim import DEFAULT_LR

TrainRule = Literal["dense", "ste", "factored", "sign"]

#: Peak learning rate of the matrices under the float baselines (docs/training.md).
BASELINE_LR = {"dense": 2e-3, "ste": 1.4e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A training run, but for its model, its text and where it runs. The defaults are those of docs/training.md.

    Raises:
        ConfigError: for a value or a combination that means nothing.
    """

    rule: TrainRule = "factored"
    """How the matrices of the blocks learn: `factored` and `sign` on integers (`TernaryConfig`); `dense`, float32
    weights and AdamW; `ste`, the same with weights rounded to trits in the forward pass."""

    accumulator: Accumulator = "int8"
    """Form of `factored`."""

    group_size: int = 64
    """Weights that share an exponent, under `factored` and `sign`."""

    ctx: int = 512
    """Tokens a window."""

    batch: int = 64
    """Windows of one forward and backward."""

    accum: int = 1
    """Micro-batches of ``batch`` windows a step."""

    steps: int = 2000
    """Updates of the weights."""

    lr: float | None = None
    """Peak of the matrices; None: the rule's own. What it means depends on the rule (docs/training.md)."""

    float_lr: float = 2e-3
    """Peak of all other parameters, by AdamW under every rule."""

    warmup: int = 50
    """Steps over which both rates rise to their peaks. Then they follow a cosine to 2 % of them."""

    seed: int = 0
    """Of the first weights, the data order and stochastic rounding, 32 bits."""

    def __post_init__(self) -> None:
        if self.rule not in get_args(TrainRule):
            raise ConfigError(f"rule={self.rule!r} is unknown: use one of {', '.join(get_args(TrainRule))}")
        for name in ("ctx", "batch", "accum", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: use at least 1")
        for name in ("lr", "float_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= torch.finfo(torch.float32).max:
                raise ConfigError(f"{name} is {value}: use 0 or more that float32 holds")
        if self.warmup < 0:
            raise ConfigError(f"warmup is {self.warmup}: use 0 or more")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}, no number of 32 bits: use 0 to {2**32 - 1}")
        if self.accumulator != "int8" and self.rule != "factored":
            raise ConfigError(f"accumulator={self.accumulator!r} is a form of 'factored': drop it under {self.rule!r}")
        _ = self.ternary

    def check_processes(self, count: int) -> None:
        """Refuse a number of processes that cannot share a micro-batch evenly.

        Raises:
            ConfigError: if they cannot.
        """
        if self.batch % count:
            raise ConfigError(f"{count} processes cannot share batch={self.batch} windows: use a multiple of {count}")

    @property
    def ternary(self) -> TernaryConfig | None:
        """What kind of ternary layers to make; None for the float baselines."""
        if self.rule == "dense" or self.rule == "ste":
            return None
        return TernaryConfig(rule=self.rule, accumulator=self.accumulator, group_size=self.group_size)

    @property
    def matrix_lr(self) -> float:
        """Peak learning rate of the matrices."""
        if self.lr is not None:
            return self.lr
        return BASELINE_LR[self.rule] if self.ternary is None else DEFAULT_LR[self.ternary.form]

    def schedule(self, step: int) -> float:
        """What both peaks are multiplied by in a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
