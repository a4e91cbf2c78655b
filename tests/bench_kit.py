"""Shared by tests of `ternarize bench`: a tiny model, and contenders without a process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ternarize.bench.llama import SHAPES
from ternarize.bench.process import ContenderError

CPU = torch.device("cpu")

TINY = SHAPES["smol"] | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Local:
    """A contender in this process, so that tests can replace parts of it."""

    def __init__(self, make: Callable[[Any], Any], task: Any, caches: Path | None = None) -> None:
        self.make, self.task, self.caches, self.asked = make, task, caches, list[str]()
        self.contender: Any = None

    def ask(self, method: str) -> None:
        self.asked.append(method)

    def answer(self) -> Any:
        try:
            self.contender = self.contender or self.make(self.task)
            return getattr(self.contender, self.asked[-1])()
        except RuntimeError as error:
            raise ContenderError(str(error)) from error

    def close(self) -> None:
        self.contender = None
