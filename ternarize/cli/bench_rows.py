"""Rows of tables and JSON that several kinds of ``ternarize bench`` have."""

from collections.abc import Sequence
from typing import Any

from ternarize.bench.turns import Result, times_dense
from ternarize.cli.output import Output


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A cell of a table: empty for None."""
    return "" if value is None else form.format(value / unit)


def outcome(result: Result[Any]) -> dict[str, Any]:
    """Who, and whether it was right."""
    return {
        "contender": result.contender,
        "batch": result.batch,
        "tokens_per_step": result.tokens,
        "status": result.status,
        "reason": result.reason,
    }


def times(result: Result[Any], results: list[Any]) -> dict[str, Any]:
    """How long a step took; empty for a result without a time."""
    if result.seconds is None:
        return {}
    return {
        "rounds": result.rounds,
        "milliseconds": result.seconds * 1e3,
        "spread": result.spread,
        "device_milliseconds": None if result.device_seconds is None else result.device_seconds * 1e3,
        "tokens_per_second": result.tokens / result.seconds,
        "times_dense": times_dense(result, results),
    }


def end_if_interrupted(results: Sequence[Result[Any]], output: Output) -> None:
    """After the results are reported.

    Raises:
        KeyboardInterrupt: if they were cut short, with a word about it.
    """
    if any(result.interrupted for result in results):
        rounds = max(result.rounds for result in results)
        output.warn(f"batch {results[0].batch} was cut short, rounds of timing: {rounds}")
        raise KeyboardInterrupt
