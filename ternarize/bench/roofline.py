"""The roofline picture of `ternarize bench linear`: arithmetic intensity against arithmetic a second.

Intensity counts weight, x and y once each, so the same layer lies further right the fewer bits its weights have. Under
the slope a kernel waits for memory, under a flat roof for the matrix units (Williams, Waterman and Patterson, CACM
52(4), 2009). Both are measured in the same run, see `ternarize.bench.ceilings`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ternarize.bench.ceilings import Ceilings
from ternarize.bench.linear import Result
from ternarize.errors import ConfigError

SUFFIXES = (".png", ".svg")

#: Panels beside each other, and inches of one.
COLUMNS = 2
PANEL = (6.4, 4.4)

#: How far the roofs reach beyond the outermost points, as a factor.
MARGIN = 2.0


def check_picture(path: Path) -> None:
    """Raise ConfigError unless a picture can be drawn to ``path``: to be known before minutes of measuring."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path} is neither PNG nor SVG: name a file that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}: make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'ternarize[bench]'") from None


def draw_roofline(path: Path, results: Sequence[Result], ceilings: Ceilings, title: str) -> None:
    """Draw a panel for each shape, with a line for each contender over its numbers of tokens.

    Args:
        path: of the picture, .png or .svg.
        results: of one or more shapes; those without a time are left out.
        ceilings: of the same run.
        title: over the picture: what it was measured on.
    """
    # The object-oriented interface draws without a display and leaves no global state.
    from matplotlib.figure import Figure

    timed = [result for result in results if result.seconds is not None]
    shapes = list(dict.fromkeys((result.out_features, result.in_features) for result in timed))
    columns = min(COLUMNS, max(1, len(shapes)))
    rows = max(1, math.ceil(len(shapes) / columns))
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    # One colour for a contender in every panel.
    colours = {name: f"C{place % 10}" for place, name in enumerate(dict.fromkeys(r.contender for r in timed))}
    span = _span([_point(result)[0] for result in timed])
    for panel, shape in zip(panels, shapes, strict=False):
        _draw_roofs(panel, ceilings, span, colours)
        for name, of_contender in _by_contender(timed, shape):
            _draw_contender(panel, name, of_contender, colours[name])
        panel.set(xscale="log", yscale="log", title=f"{shape[0]} x {shape[1]} (out x in features)")
        panel.set(xlabel="operations a byte of weight, x and y: from the fewest tokens to the most", ylabel="TFLOP/s")
        panel.grid(visible=True, which="major", alpha=0.3)
        panel.legend(loc="lower right", fontsize="small")
    for panel in panels[len(shapes) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=150)


def _point(result: Result) -> tuple[float, float]:
    """Intensity, in operations a byte, and TFLOP/s."""
    assert result.seconds is not None
    return result.flops / result.bytes, result.flops / result.seconds / 1e12


def _span(intensities: Sequence[float]) -> tuple[float, float]:
    return (min(intensities) / MARGIN, max(intensities) * MARGIN) if intensities else (1.0, 1000.0)


def _by_contender(results: Sequence[Result], shape: tuple[int, int]) -> Iterator[tuple[str, list[Result]]]:
    here = [result for result in results if (result.out_features, result.in_features) == shape]
    for name in dict.fromkeys(result.contender for result in here):
        yield name, sorted((result for result in here if result.contender == name), key=lambda result: result.tokens)


def _draw_contender(panel: Any, name: str, results: Sequence[Result], colour: str) -> None:
    points = [_point(result) for result in results]
    panel.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    panel.annotate(str(results[0].tokens), points[0], xytext=(4, -9), textcoords="offset points", fontsize="x-small")


def _draw_roofs(panel: Any, ceilings: Ceilings, span: tuple[float, float], colours: dict[str, str]) -> None:
    """A roof for each rate: the slope of memory up to where it meets the rate, flat from there on.

    The legend names them: rates may be too close for text beside the lines.
    """
    first, last = span
    slope = ceilings.bytes_per_second / 1e12
    for name, flops_per_second in ceilings.flops_per_second.items():
        rate = flops_per_second / 1e12
        ridge = min(max(rate / slope, first), last)
        heights = [min(slope * at, rate) for at in (first, ridge, last)]
        panel.plot(
            (first, ridge, last),
            heights,
            linestyle="--",
            linewidth=1,
            color=colours.get(name, "black"),
            alpha=0.6,
            label=f"{slope:.2f} TB/s, {name} {rate:.0f} TFLOP/s",
        )
