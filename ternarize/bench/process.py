"""A contender in a process of its own: its memory is its own, its start is a start, and what breaks is it alone.

A kernel that reads out of bounds takes every tensor of its process with it. Contenders take turns all the same: the one
process asks, the others wait for it. They take no interrupt: that process decides what it means, and they end with it.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from ternarize.errors import cause_of, one_line

#: Where compilers look for their caches.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TILELANG_CACHE_DIR")


class ContenderError(Exception):
    """What a contender raised in its process, in one line."""


class Remote(Protocol):
    """A contender somewhere else: questions are asked first and answered later, so that several can work at once."""

    def ask(self, method: str) -> None:
        """Start a method of the contender; the first one also makes it."""

    def answer(self) -> Any:
        """Wait for what it returns.

        Raises:
            ContenderError: for whatever it raised.
        """

    def close(self) -> None:
        """Give back the memory, also if an answer is still awaited."""


class Process:
    """A `Remote` in a process.

    Args:
        make: class or function of a module, called in the process with ``task``: makes a `turns.Contender`.
        task: what it has to do; pickled.
        caches: folder for the caches of all compilers in place of the usual ones.
    """

    def __init__(self, make: Callable[[Any], object], task: object, caches: Path | None = None) -> None:
        # A fork would inherit a CUDA context, which cannot be used.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        folders = {} if caches is None else {name: str(caches / name.lower()) for name in CACHES}
        self._process = context.Process(target=_serve, args=(theirs, make, task, folders))
        with _interrupts_blocked():
            self._process.start()
        # With imports, to begin with.
        self._working = True
        # Else the end of their process would not be the end of the pipe.
        theirs.close()

    def ask(self, method: str) -> None:
        """See `Remote`."""
        self._working = True
        # Of a process that has ended, the answer will tell.
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(method)

    def answer(self) -> Any:
        """See `Remote`."""
        try:
            worked, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ContenderError(f"its process ended with code {self._process.exitcode}") from None
        self._working = False
        if not worked:
            raise ContenderError(value)
        return value

    def close(self) -> None:
        """See `Remote`."""
        if self._working:
            self._process.terminate()
        self._connection.close()
        self._process.join()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks SIGINT in the block, and in whatever is started there from its first line to its end."""
    # Else the first start of a process starts the tracker too, and that unblocks SIGINT.
    resource_tracker.ensure_running()
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _serve(connection: Connection, make: Callable[[Any], object], task: object, environment: Mapping[str, str]) -> None:
    # Standard output may be kept for a JSON object, and compilers write to it.
    os.dup2(2, 1)
    os.environ.update(environment)
    contender: object | None = None
    while True:
        try:
            method = connection.recv()
        except EOFError:
            return
        try:
            contender = contender or make(task)
            answer = True, getattr(contender, method)()
        except Exception as error:  # whatever a compiler or a kernel raises is the finding
            traceback.print_exc()
            answer = False, one_line(cause_of(error))
        connection.send(answer)
