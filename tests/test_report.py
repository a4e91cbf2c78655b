"""The report that ternarize leaves on a model."""

import copy
import io

import pytest
from rich.console import Console

from ternarize import TernaryLinear, ternarize
from tests.kit import Block, report_of


def test_report_counts_bytes_and_errors_and_prints() -> None:
    model = ternarize(Block(), group_size=8)
    report = report_of(model)
    expert = report.swapped[0]
    # 16 x 16 weights and 16 biases: float32; then 2 bits, 2 exponents a row, int32 biases with one exponent.
    assert expert.bytes_before == 4 * (16 * 16 + 16)
    assert expert.bytes_after == 16 * 4 + 16 * 2 + 16 * 4 + 1
    # T_accum and T_momentum, then row_log2 and col_log2.
    assert expert.bytes_training == 2 * 16 * 16 + 2 * (16 + 16)
    assert report.bytes_training == 2 * expert.bytes_training
    dense = sum(row.bytes_before for row in report.skipped)
    assert dense == 4 * (2 * 16 + 2 + 11 * 16)
    assert report.bytes_before == 2 * expert.bytes_before + dense
    assert report.bytes_after == 2 * expert.bytes_after + dense
    assert expert.weight_error is not None
    original, layer = Block().get_parameter("experts.0.weight").detach(), model.get_submodule("experts.0")
    assert isinstance(layer, TernaryLinear)
    error = (original - layer.weight).square().sum() / original.square().sum()
    assert expert.weight_error == pytest.approx(float(error), rel=1e-5)

    text = str(report)
    assert "2 of 4 linear layers made ternary" in text
    for row in report.layers:
        assert row.name in text
    assert "\x1b" not in text
    console = Console(file=io.StringIO(), width=140)
    with console.capture() as capture:
        console.print(report)
    assert capture.get().rstrip() == text


def test_report_survives_deepcopy_and_is_not_in_the_state_dict() -> None:
    model = ternarize(Block())
    assert report_of(copy.deepcopy(model)) == report_of(model)
    assert not any("report" in name for name in model.state_dict())
