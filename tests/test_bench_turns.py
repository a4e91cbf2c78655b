"""What the rounds of contenders come to, from times that are known."""

import types
from typing import Any

import pytest

from ternarize.bench.turns import Entrant, Result, Stretch, take_turns, times_dense
from tests.bench_kit import Local


class Timed:
    """A contender that is right and gives these stretches, one after the other."""

    def __init__(self, stretches: list[Stretch]) -> None:
        self.left = iter(stretches)

    def prepare(self) -> Any:
        return types.SimpleNamespace(fault="")

    def run(self) -> Stretch:
        return next(self.left)

    def check(self) -> str:
        return ""

    def peak_bytes(self) -> int:
        return 7


def test_a_result_has_the_medians_of_its_rounds() -> None:
    rounds = [(5.0, 0.5), (1.0, 0.1), (2.0, 0.3), (4.0, 0.2), (3.0, 0.9)]
    on_gpu = [Stretch(seconds=host, device_seconds=device, phases={"update": device / 2}) for host, device in rounds]
    on_cpu = [Stretch(seconds=2 * host, device_seconds=None) for host, _ in rounds]
    ternary, dense = [Result[Any](contender=name, batch=1, tokens=1) for name in ("ternary", "dense")]
    entrants = (Entrant(ternary, Local(Timed, on_gpu)), Entrant(dense, Local(Timed, on_cpu)))
    take_turns(entrants, 0, at_once=False)
    assert (ternary.rounds, ternary.seconds, ternary.peak_bytes) == (5, 3.0, 7)
    # The quartiles are 1.5 and 4.5.
    assert ternary.spread == pytest.approx(1.0)
    assert (ternary.device_seconds, ternary.phases) == (0.3, {"update": 0.15})
    assert (dense.seconds, dense.device_seconds, dense.phases) == (6.0, None, {})
    assert times_dense(ternary, [ternary, dense]) == 2.0
    assert times_dense(ternary, [ternary]) is None
