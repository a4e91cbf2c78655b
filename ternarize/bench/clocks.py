"""Clocks of whole steps: the host's, and the device's with its work waiting in a queue."""

import time
from collections.abc import Callable
from typing import Any

import torch

#: Between the host's time for a stretch of steps and the pause that the device is given to let the host run ahead; and
#: the clock that the pause is counted by, which is about what data centre GPUs have (H200: 1.98 GHz).
HEAD_START = 1.5
CYCLES_PER_SECOND = 2e9


def synchronize(device: torch.device) -> None:
    """Wait for all work of a device; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def host_seconds(run: Callable[[], object], device: torch.device) -> float:
    """From the call of ``run`` to the end of all its work."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def hold_device(seconds: float, device: torch.device) -> None:
    """Keep a GPU busy for `HEAD_START` times ``seconds``: what is launched meanwhile waits in its queue."""
    if device.type == "cuda":
        torch.cuda._sleep(int(HEAD_START * seconds * CYCLES_PER_SECOND))


class Laps:
    """The time between marks, by the clock of the device: marks wait in its queue, so that none waits for its work.

    Args:
        device: a GPU; a CPU's clock is the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """End a lap and begin the next one."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every lap; waits for the last mark."""
        synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [start.elapsed_time(end) * 1e-3 for start, end in pairs]
        return [end - start for start, end in pairs]
