import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ternarize.backends.select import _choose
from ternarize.backends.tilelang import WITHOUT_NVCC, finds_nvcc
from ternarize.checkpoint.format import PackedLayer
from ternarize.cli import FAILURE, OK, USAGE, main
from ternarize.cli.prewarm import _ranges, _tokens
from ternarize.config import TernaryConfig
from ternarize.prewarm import plan_call

pytest.importorskip("tilelang", reason="TileLang is for Linux")

ROOT = Path(__file__).parents[2]

needs_nvcc = pytest.mark.skipif(not finds_nvcc(), reason="needs nvcc")

#: One call of two layers, for one token: one kernel.
SMALL = ["prewarm", "64x128+16x128", "--tokens", "1", "--json"]


@pytest.fixture
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A choice of kernels that depends on the environment as it is now."""
    for name in ("TERNARIZE_BACKEND", "ARB_TERNARY_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    _choose.cache_clear()
    yield
    _choose.cache_clear()


def prewarm(cache: Path, *more: str) -> dict[str, Any]:
    """Run `SMALL`, with more arguments, in a process of its own."""
    environment = {"TILELANG_CACHE_DIR": str(cache), "TERNARIZE_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "ternarize", *SMALL, *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == OK, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@needs_nvcc
def test_what_two_processes_compile_at_once_a_third_only_loads(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:
        first = list(pool.map(prewarm, [tmp_path, tmp_path]))
    for report in first:
        assert report["compiled"] + report["cached"] == 1
        assert report["failed"] == []
        (call,) = report["calls"]
        assert (call["backend"], call["out_features"], call["kernels"][0]["tokens"]) == ("tilelang", [64, 16], "1")
    assert any(report["compiled"] for report in first)
    warm = prewarm(tmp_path)
    assert (warm["compiled"], warm["cached"], warm["failed"]) == (0, 1, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU gets")
def test_without_nvcc_prewarm_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_choices: None
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert main(SMALL) == FAILURE
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == WITHOUT_NVCC
    assert "pip install 'tilelang[nvcc]'" in report["missing"]
    assert report["calls"][0]["backend"] == "triton"
    assert report["calls"][0]["kernels"] == []
    assert "TileLang compiles with nvcc" in report["calls"][0]["reason"]
    assert main(["prewarm", "32x128", "--tokens", "1"]) == FAILURE
    assert "there is no nvcc" in capsys.readouterr().err


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU gets")
def test_a_kernel_that_does_not_compile_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh_choices: None
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("nvcc: no space left")

    monkeypatch.setattr("ternarize.backends.tilelang.build.tilelang.compile", broken)
    assert main(["prewarm", "48x128", "--tokens", "1", "--json"]) == FAILURE
    (failure,) = json.loads(capsys.readouterr().out)["failed"]
    assert failure["error"] == "RuntimeError: nvcc: no space left"
    assert "N=48" in failure["program"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_folder"], "no_such_folder is no folder, and as shapes: 'no_such_folder' is no shape"),
        (["64x64", "--group-size", "3"], "group_size 3 is not a positive multiple of 4"),
        (["64x64", "--tokens", "0"], "'0' is no number or range of tokens"),
        (["64x64", "--tokens", "9-3"], "'9-3' is no number or range of tokens"),
        (["64x64", "--jobs", "0"], "'0' is no positive number"),
    ],
)
def test_a_wrong_call_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    try:
        code: Any = main(["prewarm", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == USAGE
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_tokens_are_read_and_shown_as_ranges() -> None:
    assert _tokens("64,1-3,2") == (1, 2, 3, 64)
    assert _ranges([1, 2, 3, 64]) == "1-3,64"
    assert _ranges(list(_tokens("all"))) == "1-8192"


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="chooses for Hopper")
def test_kernels_for_int8_activations_are_planned_by_launch(fresh_choices: None) -> None:
    config = TernaryConfig(activation="int8")
    call = tuple(PackedLayer(config, in_features=128, out_features=N) for N in (64, 16, 16))
    planned = plan_call(call, [1, 40], torch.bfloat16, "auto", (9, 0))
    assert planned.choice.backend == "tilelang"
    # One token is rounded by its call, unless the number of tokens is dynamic.
    assert [(program.activation, tokens) for program, tokens in planned.programs.items()] == [
        ("int8", [1]),
        ("float", [1]),
        ("int8", [40]),
    ]
    assert [getattr(program.tile, "DIGITS", None) for program in planned.programs] == [0, 1, None]
    assert {tuple(layer.N for layer in program.layers) for program in planned.programs} == {(64, 16, 16)}


@needs_nvcc
def test_kernels_for_int8_activations_are_made(tmp_path: Path) -> None:
    report = prewarm(tmp_path, "--tokens", "1,40", "--activation", "int8")
    assert (report["compiled"], report["failed"]) == (3, [])
    assert [kernel["program"] for kernel in report["calls"][0]["kernels"]] == ["DecodeTile", "DecodeTile", "Tile"]
