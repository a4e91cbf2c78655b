"""Timing of many short calls: one CUDA graph over copies of the operands, all contenders in turns, medians.

A call of a few microseconds is shorter than its launch, so calls are captured into a graph and its replays are timed:
what Python, the dispatcher and the driver take for a call is outside of the figures, as it is in a compiled model that
runs by CUDA graphs. Each call of the graph works on another copy of the weight, and the copies together are several
times the L2 cache, so that every call reads its weight from memory, as a model with many layers does.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Call = Callable[[], Tensor]

#: Copies of a weight take at least so many times the bytes of the L2 cache.
CACHE_FACTOR = 4

#: More copies than this are not made: weights under 0.5 MB may then be read from the cache.
MAX_COPIES = 512

#: A replay holds as many calls as take so long when they are launched one by one: in a graph still several hundred
#: microseconds, and the events around it are exact to about one.
REPLAY_SECONDS = 4e-3

#: Samples that a median is taken of, however long they take.
MIN_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one call."""

    seconds: float
    """The median."""
    spread: float
    """Distance of the quartiles, relative to the median: differences below it are noise."""


class Pass(Protocol):
    """Calls that are timed as a whole."""

    output: Tensor
    """Of the last call, overwritten by the next run."""

    def run(self) -> float:
        """Run them all; returns the mean seconds of a call."""


def copies_needed(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight make the L2 cache cold; 1 on the CPU, whose figures may come from its cache."""
    if device.type != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_COPIES, math.ceil(CACHE_FACTOR * cache_bytes / weight_bytes))


class _HostPass:
    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        self.run()

    def run(self) -> float:
        start = time.perf_counter()
        for call in self._calls:
            self.output = call()
        return (time.perf_counter() - start) / len(self._calls)


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


class _GraphPass:
    def __init__(self, calls: Sequence[Call]) -> None:
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Entered here too: a capture that fails leaves its stream the current one.
        with torch.cuda.stream(stream):
            # Twice: the first makes handles and workspaces of this stream and loads kernels.
            for _ in range(2):
                start = time.perf_counter()
                for call in calls:
                    call()
                stream.synchronize()
            loops = max(1, math.ceil(REPLAY_SECONDS / (time.perf_counter() - start)))
            self._capture(list(calls) * loops, stream)
        # The graph knows addresses only: the calls keep their operands alive.
        self._calls, self._loops = calls, loops
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.run()

    def _capture(self, calls: Sequence[Call], stream: torch.cuda.Stream) -> None:
        self._graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(self._graph, pool=pool, stream=stream):
                for call in calls:
                    self.output = call()
        except Exception:
            # Of a capture that CUDA has given up the allocator never learns the end, and later captures would fail too.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            raise

    def run(self) -> float:
        # The first replay is not timed: it leaves the caches as these calls do, and while it runs the second is
        # launched, so that no launch lies between the events.
        self._graph.replay()
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._start.elapsed_time(self._end)
        return milliseconds * 1e-3 / (len(self._calls) * self._loops)


def record(calls: Sequence[Call], device: torch.device) -> Pass:
    """Warm calls up and make them one pass: a CUDA graph on a GPU, a loop elsewhere."""
    return _GraphPass(calls) if device.type == "cuda" else _HostPass(calls)


def time_in_turns(passes: Sequence[Pass], seconds: float) -> list[Timing]:
    """Time passes, one run of each in every round, so that all meet the same clocks and temperatures.

    Args:
        passes: from `record`.
        seconds: that the rounds take together; at least `MIN_ROUNDS` are run.
    """
    deadline = time.perf_counter() + seconds
    rounds: list[list[float]] = []
    while len(rounds) < MIN_ROUNDS or (passes and time.perf_counter() < deadline):
        rounds.append([each.run() for each in passes])
    return [_timing(samples) for samples in zip(*rounds, strict=True)]


def _timing(samples: Sequence[float]) -> Timing:
    first, median, third = statistics.quantiles(samples, n=4)
    return Timing(median, (third - first) / median)
