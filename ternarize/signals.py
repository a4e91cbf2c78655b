"""Signals that end a long run in order."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stop_signal(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """An event that the first of these signals sets; the next one acts as it would without this.

    Nothing outside of the main thread, where Python takes no handlers.
    """
    stop = threading.Event()
    former = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, *_: object) -> None:
        stop.set()
        signal.signal(number, former[signal.Signals(number)])

    with _handled(handle, *numbers):
        yield stop


@contextlib.contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    """A signal acts as Ctrl-C does: what is half written is removed on the way out. Only in the main thread."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, number):
        yield


@contextlib.contextmanager
def _handled(handle: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    """Signals have another handler in the block, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
