import json

import pytest
import torch
from torch import Tensor

from ternarize import ops
from ternarize.bench import linear
from ternarize.bench.ceilings import measure_ceilings
from ternarize.cli import FAILURE, INTERRUPTED, OK, USAGE, main
from tests.bench_kit import interrupt_at

SMALL = ["--shapes", "32x64,40x100", "--tokens", "1,17", "--kernels", "torch", "--seconds-per-cell", "0"]


def test_bench_linear_reports_every_cell_and_what_it_ran_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["bench", "linear", *SMALL, "--group-size", "32", "--planes", "2", "--dtype", "float16", "--json"]) == OK
    )
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == (
        "ternarize bench linear --op linear --shapes 32x64,40x100 --tokens 1,17 --group-size 32 --planes 2 "
        "--dtype float16 --kernels torch --activation float --seconds-per-cell 0"
    )
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert report["device"]["name"]
    assert report["date"].endswith("+00:00")
    assert min(report["ceilings"]["gigabytes_per_second"].values()) > 0
    cells = {
        (cell["out_features"], cell["in_features"], cell["tokens"], cell["contender"]): cell for cell in report["cells"]
    }
    assert len(cells) == 2 * 2 * 5
    kernel, dense = cells[40, 100, 17, "torch"], cells[40, 100, 17, "dense"]
    assert kernel["times_dense"] == pytest.approx(dense["microseconds"] / kernel["microseconds"])
    assert kernel["teraflops_per_second"] == pytest.approx(2 * 40 * 100 * 17 / kernel["microseconds"] * 1e-6)
    assert kernel["percent_of_floor"] > 0
    refused = cells[40, 100, 17, "fp8"]
    assert refused["status"] == "not run"
    assert "microseconds" not in refused


@pytest.mark.parametrize("op", ["grad-input", "update"])
def test_bench_linear_measures_what_training_does_with_a_layer(capsys: pytest.CaptureFixture[str], op: str) -> None:
    assert main(["bench", "linear", *SMALL, "--op", op, "--group-size", "32", "--json"]) == OK
    report = json.loads(capsys.readouterr().out)
    assert f"--op {op}" in report["command"]
    found = [(cell["out_features"], cell["in_features"], cell["tokens"], cell["contender"]) for cell in report["cells"]]
    shapes = [(N, K, M) for N, K in ((32, 64), (40, 100)) for M in (1, 17)]
    assert found == [(*shape, name) for shape in shapes for name in ("dense", "torch")]
    assert all(cell["microseconds"] > 0 for cell in report["cells"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--op", "grad-input", "--activation", "int8"], "--activation int8 is of linear layers forward"),
        (["--op", "update", "--planes", "2"], "only layers of one plane train"),
    ],
)
def test_bench_linear_refuses_what_training_has_not(
    capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["bench", "linear", *SMALL, *arguments]) != OK
    assert reason in capsys.readouterr().err


def test_bench_linear_prints_a_table_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "linear", *SMALL]) == OK
    out = capsys.readouterr().out
    for words in (
        "32 x 64 (out x in features)",
        "40 x 100 (out x in features)",
        "ceilings: read",
        "--planes 1",
        "GB/s",
    ):
        assert words in out
    assert "int8, 1, 17 tokens: not run: torch._int_mm needs multiples of 8, got 40x100\n" in out


def test_an_interrupted_bench_linear_keeps_the_finished_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_cell = linear.measure_cell
    monkeypatch.setattr(linear, "measure_cell", interrupt_at(4, measure_cell))
    assert main(["bench", "linear", *SMALL, "--json"]) == INTERRUPTED
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["error"]) == (False, "interrupted")
    assert report["ceilings"]["gigabytes_per_second"]["read"] > 0
    found = [(cell["out_features"], cell["tokens"]) for cell in report["cells"]]
    assert found == [shape for shape in ((32, 1), (32, 17), (40, 1)) for _ in range(5)]
    monkeypatch.setattr(linear, "measure_cell", interrupt_at(4, measure_cell))
    assert main(["bench", "linear", *SMALL]) == INTERRUPTED
    captured = capsys.readouterr()
    assert "40 x 100 (out x in features)" in captured.out
    assert "int8, 1 tokens: not run: " in captured.out
    assert captured.err == "ternarize: error: interrupted\n"


def test_an_interrupt_before_the_first_cell_is_an_object_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ternarize.cli.bench.measure_ceilings", interrupt_at(1, measure_ceilings))
    assert main(["bench", "linear", *SMALL, "--json"]) == INTERRUPTED
    report = json.loads(capsys.readouterr().out)
    assert (report["cells"], report["ok"], report["error"]) == ([], False, "interrupted")


def test_a_wrong_kernel_fails_the_run_and_gets_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, T_packed: list[Tensor], *_: object) -> list[Tensor]:
        print("a compiler's message")
        return [x.new_full((x.shape[0], T_packed[0].shape[0]), torch.nan)]

    monkeypatch.setattr(ops, "lowered", lambda *_: wrong)
    assert main(["bench", "--json", "linear", *SMALL]) == FAILURE
    captured = capsys.readouterr()
    assert "a compiler's message" in captured.err
    report = json.loads(captured.out)
    assert report["ok"] is False
    results = [cell for cell in report["cells"] if cell["contender"] == "torch"]
    assert [cell["status"] for cell in results] == ["wrong"] * 4
    assert all("microseconds" not in cell and cell["relative_error"] is None for cell in results)
    assert main(["bench", "linear", *SMALL]) == FAILURE
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WHAT"),
        (["linear", "--shapes", "64"], "'64' is no shape"),
        (["linear", "--shapes", "0x64"], "'0x64' is no shape"),
        (["linear", "--tokens", "1,0"], "'0' is no positive number"),
        (["linear", "--kernels", "cuda"], "'cuda' is not among kernels"),
        (["linear", "--seconds-per-cell", "-1"], "'-1' is no time in seconds"),
        (["train", "--seconds", "inf"], "'inf' is no time in seconds"),
        (["decode", "--seconds", "long"], "'long' is no time in seconds"),
    ],
)
def test_a_wrong_call_of_bench_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments])
    assert exit_info.value.code == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_group_size_that_means_nothing_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "linear", "--group-size", "3"]) == USAGE
    assert "group_size 3 is not a positive multiple of 4" in capsys.readouterr().err
