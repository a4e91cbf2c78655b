"""Contenders that take turns: each is checked, those that are right are timed in rounds, and checked once more."""

import contextlib
import dataclasses
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar

from ternarize.bench.process import ContenderError, Remote
from ternarize.bench.timing import MIN_ROUNDS
from ternarize.signals import stop_signal

#: The name of the contender that times are compared with.
DENSE = "dense"

#: Quartiles need so many.
SUMMARY_ROUNDS = 2


class Ready(Protocol):
    """What is known of a contender before its time."""

    @property
    def fault(self) -> str:
        """What is wrong with its first results; empty if nothing is."""


ReadyT = TypeVar("ReadyT", bound=Ready)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Time of one step, the mean of a stretch of them."""

    seconds: float
    """By the host's clock, from the first call to the end of the last."""
    device_seconds: float | None
    """By the device's, with its work waiting in a queue: without the host's part. None on a CPU."""
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of the parts of a step, if it has any, by the device's clock."""


class Contender(Protocol):
    """What can take part."""

    def prepare(self) -> Ready:
        """Compile and check."""

    def run(self) -> Stretch:
        """Time some steps."""

    def check(self) -> str:
        """What is wrong with what was computed last; empty if nothing is."""

    def peak_bytes(self) -> int:
        """The most that was allocated on the device; 0 on a CPU."""


@dataclasses.dataclass(kw_only=True)
class Result(Generic[ReadyT]):
    """One contender at one batch size. What was not measured is None."""

    contender: str
    batch: int
    tokens: int
    """Of a step."""
    status: Literal["ok", "wrong", "failed"] = "ok"
    reason: str = ""
    """Why it is not ok."""
    interrupted: bool = False
    """Whether an interrupt cut short what was done with all contenders."""
    ready: ReadyT | None = None
    rounds: int = 0
    """Of timing."""
    seconds: float | None = None
    """Of a step, the median."""
    spread: float | None = None
    """Distance of the quartiles, relative to the median."""
    device_seconds: float | None = None
    """Of a step on the device alone, the median."""
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of its parts, medians."""
    peak_bytes: int | None = None


class Entrant:
    """A contender in the running; what it raises becomes its result, and it takes no further part."""

    def __init__(self, result: Result[Any], remote: Remote) -> None:
        self.result, self._remote = result, remote

    def ask(self, method: str) -> None:
        """As of `Remote`."""
        if self.result.status != "failed":
            self._remote.ask(method)

    def answer(self) -> Any:
        """As of `Remote`; None if it has failed."""
        if self.result.status == "failed":
            return None
        try:
            return self._remote.answer()
        except ContenderError as error:
            self.result.status, self.result.reason = "failed", str(error)
            return None

    def close(self) -> None:
        """As of `Remote`."""
        self._remote.close()


@contextlib.contextmanager
def until_interrupt(results: Sequence[Result[Any]]) -> Iterator[None]:
    """An interrupt ends the block: the results keep what was measured, and what has no time yet has failed."""
    try:
        yield
    except KeyboardInterrupt:
        for result in results:
            result.interrupted = True
            if result.status == "ok" and result.seconds is None:
                result.status, result.reason = "failed", "interrupted"


def take_turns(entrants: Iterable[Entrant], seconds: float, *, at_once: bool) -> None:
    """Check every contender, time those that are right, and fill in the results. Closes them all.

    Args:
        entrants: with results that are filled in. Made one by one here, so that an interrupt leaves none open.
        seconds: of timed rounds, all together; at least `MIN_ROUNDS` are run.
        at_once: whether they prepare at the same time, which is faster, but not for a start that is timed.

    Raises:
        KeyboardInterrupt: at once while they prepare. The first one in timed rounds ends them, and is raised when the
            results are filled in.
    """
    # A stack goes on closing if another interrupt comes in the middle of it.
    with contextlib.ExitStack() as stack:
        made = []
        for entrant in entrants:
            stack.callback(entrant.close)
            made.append(entrant)
        _prepare(made, at_once=at_once)
        with stop_signal(signal.SIGINT) as stop:
            _time([entrant for entrant in made if entrant.result.status == "ok"], seconds, stop)
        if stop.is_set():
            raise KeyboardInterrupt


def _prepare(entrants: Sequence[Entrant], *, at_once: bool) -> None:
    if at_once:
        for entrant in entrants:
            entrant.ask("prepare")
    for entrant in entrants:
        if not at_once:
            entrant.ask("prepare")
        ready: Ready | None = entrant.answer()
        if ready is not None:
            entrant.result.ready = ready
            _judge(entrant.result, ready.fault, "in the first calls")


def _judge(result: Result[Any], fault: str, when: str) -> None:
    if fault:
        result.status, result.reason = "wrong", f"{when}: {fault}"


def _time(entrants: Sequence[Entrant], seconds: float, stop: threading.Event) -> None:
    """Rounds of one stretch each, then the check again: what the timed calls computed must have been right too."""
    stretches: dict[str, list[Stretch]] = {entrant.result.contender: [] for entrant in entrants}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while entrants and not stop.is_set() and (rounds < MIN_ROUNDS or time.perf_counter() < deadline):
        rounds += 1
        for entrant in entrants:
            entrant.ask("run")
            stretch: Stretch | None = entrant.answer()
            if stretch is not None:
                stretches[entrant.result.contender].append(stretch)
    for entrant in entrants:
        result = entrant.result
        entrant.ask("check")
        fault: str | None = entrant.answer()
        entrant.ask("peak_bytes")
        result.peak_bytes = entrant.answer()
        if fault is None:
            continue
        result.rounds = len(stretches[result.contender])
        _judge(result, fault, "after the timed calls")
        if result.status == "ok" and result.rounds >= SUMMARY_ROUNDS:
            _summarise(result, stretches[result.contender])


def _summarise(result: Result[Any], stretches: Sequence[Stretch]) -> None:
    first, result.seconds, third = statistics.quantiles([stretch.seconds for stretch in stretches], n=4)
    result.spread = (third - first) / result.seconds
    on_device = [stretch.device_seconds for stretch in stretches if stretch.device_seconds is not None]
    result.device_seconds = statistics.median(on_device) if on_device else None
    result.phases = {name: statistics.median(s.phases[name] for s in stretches) for name in stretches[0].phases}


def times_dense(result: Result[ReadyT], results: Sequence[Result[ReadyT]]) -> float | None:
    """Tokens a second in times of the dense contender's."""
    dense = next((other.seconds for other in results if other.contender == DENSE), None)
    return None if dense is None or result.seconds is None else dense / result.seconds


def largest(errors: Iterable[float]) -> float:
    """NaN if any is: of a list that holds NaN, max depends on the order."""
    found = list(errors)
    return next((error for error in found if error != error), max(found))
