"""What verbs print with: rich tables and progress for people, silence where --json wants one object."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


def finite(value: float | None) -> float | None:
    """JSON has neither NaN nor Inf."""
    return None if value is None or not math.isfinite(value) else value


class Interrupted(KeyboardInterrupt):
    """An interrupt of a verb that has something to report all the same.

    Args:
        report: the part of its JSON object that is there.
    """

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__()
        self.report = report


class Output:
    """Where a verb prints.

    Args:
        as_json: standard output is kept for the one JSON object; tables and notes go nowhere.
        quiet: no progress bars. They are also off where standard error is no terminal.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        # Names of files and tensors may look like markup.
        self.console = Console(quiet=as_json, markup=False)
        self._errors = Console(stderr=True)
        self._progress_off = quiet or as_json or not self._errors.is_terminal

    def silence(self) -> None:
        """Print nothing from now on but warnings: another process tells the same."""
        self.as_json = False
        self.console.quiet = self._progress_off = True

    @contextmanager
    def bytes_progress(self) -> Iterator[Progress]:
        """A progress display whose tasks count bytes, with speed and time left."""
        with self._progress(DownloadColumn(), TransferSpeedColumn()) as progress:
            yield progress

    @contextmanager
    def steps_progress(self) -> Iterator[Progress]:
        """A progress display whose tasks count steps, with time left."""
        with self._progress(MofNCompleteColumn()) as progress:
            yield progress

    def _progress(self, *counts: ProgressColumn) -> Progress:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn())
        return Progress(*columns, console=self._errors, disable=self._progress_off, transient=True)

    def warn(self, message: str) -> None:
        """One line on standard error, also with --json."""
        self._errors.print(Text.assemble(("warning:", "yellow"), f" {message}"), highlight=False, soft_wrap=True)
