"""What all verbs share: the version, and errors from inside torch.compile."""

import importlib.metadata
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ternarize.checkpoint import convert
from ternarize.cli import FAILURE, INTERRUPTED, OK, USAGE, main
from ternarize.config import TernaryConfig


@pytest.fixture
def packed(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    torch._dynamo.reset()
    convert(tiny_checkpoint, tmp_path / "packed", TernaryConfig(planes=3, group_size=32))
    yield tmp_path / "packed"
    torch._dynamo.reset()


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"ternarize {importlib.metadata.version('ternarize')}\n"


def test_without_a_verb_the_help_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=str(USAGE)):
        main([])
    error = capsys.readouterr().err
    assert "see ternarize --help" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("sub_verb", "meaning"),
    [
        ("linear", "one ternary layer beside dense products"),
        ("decode", "one token after the other"),
        ("prefill", "whole prompts"),
        ("train", "training steps"),
    ],
)
def test_the_help_of_a_bench_says_what_it_measures(
    sub_verb: str, meaning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=str(OK)):
        main(["bench", sub_verb, "--help"])
    assert meaning in capsys.readouterr().out


@pytest.mark.parametrize(
    "verb", [["eval", "--max-tokens", "40"], ["generate", "--prompt", "hello"]], ids=["eval", "generate"]
)
@pytest.mark.parametrize(
    ("kernels", "code", "message"),
    [
        ("foo", USAGE, "TERNARIZE_BACKEND is 'foo': use one of auto, tilelang, triton, torch"),
        pytest.param(
            "tilelang",
            FAILURE,
            "kernels=tilelang cannot run linear: the tensors are on cpu, need cuda; use auto",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU refuses"),
        ),
    ],
)
def test_errors_inside_torch_compile_are_one_line(
    verb: list[str],
    kernels: str,
    code: int,
    message: str,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERNARIZE_BACKEND", kernels)
    assert main([*verb, str(packed), "--compile"]) == code
    error = capsys.readouterr().err
    assert error.startswith(f"ternarize: error: {message}")
    assert error.count("\n") == 1


def cpu_memory() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")


@pytest.mark.parametrize("allocate", [cpu_memory, gpu_memory])
def test_too_little_memory_is_one_line(
    allocate: Callable[[], None],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ternarize.cli.eval.evaluate.load", lambda _: allocate())
    assert main(["eval", str(tiny_checkpoint)]) == FAILURE
    error = capsys.readouterr().err
    assert error.startswith("ternarize: error: out of memory (")
    assert error.count("\n") == 1


def test_errors_of_other_kinds_are_not_hidden(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("ternarize.cli.eval.evaluate.load", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["eval", str(tiny_checkpoint)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_verb_that_is_ended_leaves_nothing_half_written(
    number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(_: object, folder: Path) -> None:
        assert any(folder.iterdir())
        signal.raise_signal(number)

    monkeypatch.setattr("ternarize.checkpoint.safetensors_files.SafetensorsFiles.save_companions", end)
    # A signal that is not taken would end the tests; Python takes no SIGINT where it runs in a shell's background.
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    former_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["convert", str(tiny_checkpoint), str(tmp_path / "out"), "--group-size", "32"]) == INTERRUPTED
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, former)
        signal.signal(signal.SIGINT, former_interrupt)
    assert not any(tmp_path.iterdir())
