"""Shared by tests of `ternarize bench`: a tiny model, and contenders without a process."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ternarize.bench.llama import SHAPES
from ternarize.bench.process import ContenderError
from ternarize.cli import USAGE, main

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


def interrupt_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with a SIGINT to this process in one of its calls, counted from 1."""
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            # A shell starts what is to run in the background without a handler.
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    return interrupted


def assert_usage_error(call: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong call of the command is one line on standard error, with ``message`` in it."""
    try:
        code = main(call)
    except SystemExit as exit_info:
        code = exit_info.code  # type: ignore[assignment]  # an integer, from argparse
    assert code == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
