"""Signals that end a long run in order."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signal(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """An event that the first of these signals sets; the next one acts as it would without this.

    Nothing outside of the main thread, where Python takes no handlers.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, *_: object) -> None:
        stop.set()
        signal.signal(number, former[signal.Signals(number)])

    for number in former:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    """A signal acts as Ctrl-C does: what is half written is removed on the way out. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, former)
