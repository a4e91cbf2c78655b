"""The curves of one or several runs as a picture."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ternarize.errors import ConfigError

#: Part of the steps, at the start, that is not drawn.
FIRST_PART = 0.04


def read_log(log: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of a log.jsonl, up to a step; lines that are damaged, as the last one of a crash, are left out."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            # Fields that are not there, or are something else.
            numbers = [record[name] or 0.0 for name in ("step", "loss", "validation", "seconds")]
            usable = all(isinstance(number, int | float) for number in numbers)
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        if usable and (last_step is None or record["step"] <= last_step):
            records.append(record)
    return records


def draw_curves(runs: Mapping[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw training losses (thin) and validation losses (with points) over steps, as a PNG.

    Both axes are logarithmic, on which losses fall about straight and those of long runs can be told apart. The first
    steps, in which a model learns how often each token comes, are left out.

    Args:
        runs: records of logs by what to call them.
        file: to write.

    Raises:
        ConfigError: without matplotlib.
        OSError: if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    except ImportError:
        raise ConfigError("drawing curves needs matplotlib: pip install 'ternarize[train]'") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    first = FIRST_PART * max((r["step"] for records in runs.values() for r in records), default=0)
    for i, (name, all_records) in enumerate(runs.items()):
        records = [r for r in all_records if r["step"] > first]
        # matplotlib sets what is between dollars as mathematics, hides what begins with _ and needs Unicode.
        label = " " + name.replace("$", r"\$").encode(errors="replace").decode()
        trained = [r for r in records if r["loss"] is not None]
        validated = [r for r in records if r["validation"] is not None]
        axes.plot(_column(trained, "step"), _column(trained, "loss"), color=f"C{i}", alpha=0.3, linewidth=0.8)
        axes.plot(_column(validated, "step"), _column(validated, "validation"), color=f"C{i}", marker=".", label=label)
    # Without a number above zero, as of no steps or losses that are all infinite, there are no logarithms.
    if math.isfinite(axes.dataLim.minposx) and math.isfinite(axes.dataLim.minposy):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("steps")
    axes.set_ylabel("nats a token; points: validation")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, dpi=120)


def _column(records: list[dict[str, Any]], name: str) -> list[Any]:
    return [record[name] for record in records]
