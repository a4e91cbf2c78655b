import json
import sys
from pathlib import Path

import pytest

from ternarize.bench.ceilings import Ceilings
from ternarize.bench.linear import Result
from ternarize.bench.roofline import draw_roofline
from ternarize.cli import OK, USAGE, main

SMALL = ["--shapes", "32x64", "--tokens", "1,17", "--kernels", "torch", "--seconds-per-cell", "0"]


@pytest.mark.parametrize(("name", "start"), [("roofline.png", b"\x89PNG"), ("roofline.svg", b"<?xml")])
def test_bench_linear_draws_a_picture(
    tmp_path: Path, name: str, start: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / name
    assert main(["bench", "linear", *SMALL, "--plot", str(file), "--json"]) == OK
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 2 * 5
    assert file.read_bytes().startswith(start)


def test_points_and_roofs_are_where_the_figures_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    ceilings = Ceilings(read_bytes_per_second=4e12, copy_bytes_per_second=3e12, flops_per_second={"dense": 800e12})
    results = [
        Result(out_features=N, in_features=1000, tokens=tokens, contender="dense", seconds=1e-5, bytes=2 * 10**6)
        for N in (1000, 2000, 3000)
        for tokens in (100, 1)
    ]
    results.append(Result(out_features=1000, in_features=1000, tokens=1, contender="torch", status="wrong"))
    draw_roofline(tmp_path / "roofline.svg", results, ceilings, "a card")
    (figure,) = drawn
    first, *_, empty = figure.axes
    assert len(figure.axes) == 4
    assert not empty.axison
    roof, dense = first.get_lines()
    assert dense.get_xydata().tolist() == [pytest.approx((1, 0.2)), pytest.approx((100, 20))]
    # From half the smallest intensity by way of 800 / 4 to twice the largest, 300 operations a byte.
    assert roof.get_xydata().tolist() == [pytest.approx(point) for point in ((0.5, 2), (200, 800), (600, 800))]
    assert roof.get_label() == "4.00 TB/s, dense 800 TFLOP/s"
    assert (roof.get_color(), dense.get_label()) == (dense.get_color(), "dense")
    assert first.get_title() == "1000 x 1000 (out x in features)"


@pytest.mark.parametrize(
    ("name", "message"), [("roofline.pdf", "neither PNG nor SVG"), ("none/roofline.png", "make it first")]
)
def test_a_picture_that_cannot_be_is_a_wrong_call(
    tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "linear", *SMALL, "--plot", str(tmp_path / name)]) == USAGE
    assert message in capsys.readouterr().err


def test_without_matplotlib_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "linear", *SMALL, "--plot", str(tmp_path / "roofline.png")]) == USAGE
    assert "pip install 'ternarize[bench]'" in capsys.readouterr().err
