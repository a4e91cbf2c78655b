"""Processes of contenders under a SIGINT; what a run keeps of its results is in the tests of each kind of bench."""

import functools
import importlib
import os
import signal
from typing import Any

import pytest

from ternarize.bench.process import Process
from ternarize.bench.turns import Entrant, Result, take_turns
from tests.bench_kit import Local, interrupt_at


def test_a_process_takes_no_interrupt_and_ends_in_the_middle_of_its_work() -> None:
    remote = Process(importlib.import_module, "signal")
    pid = remote._process.pid
    assert pid is not None
    for _ in range(2):
        # The first one comes before the process has run a line.
        os.kill(pid, signal.SIGINT)
        remote.ask("valid_signals")
        assert signal.SIGINT in remote.answer()
    remote.ask("pause")
    remote.close()
    assert remote._process.exitcode == -signal.SIGTERM


def test_a_process_that_still_imports_is_not_waited_for() -> None:
    remote = Process(importlib.import_module, "signal")
    remote.close()
    assert remote._process.exitcode == -signal.SIGTERM


def test_a_process_that_is_done_ends_by_itself() -> None:
    remote = Process(importlib.import_module, "signal")
    remote.ask("valid_signals")
    remote.answer()
    remote.close()
    assert remote._process.exitcode == 0


def test_an_interrupt_while_contenders_are_made_closes_those_that_are() -> None:
    closed: list[str] = []

    class Closing(Local):
        def close(self) -> None:
            closed.append(self.task)

    make = interrupt_at(3, functools.partial(Closing, str))
    results: list[Result[Any]] = [Result(contender=name, batch=1, tokens=1) for name in "abc"]
    with pytest.raises(KeyboardInterrupt):
        take_turns((Entrant(result, make(result.contender)) for result in results), 0, at_once=True)
    assert sorted(closed) == ["a", "b"]
