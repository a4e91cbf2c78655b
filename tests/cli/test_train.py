import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ternarize.cli import FAILURE, OK, USAGE, main

TINY = ["--hidden", "64", "--layers", "1", "--ctx", "16", "--batch", "2", "--steps", "4", "--device", "cpu"]


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(100)), encoding="utf-8")
    return ["train", "--text", str(text), "--out", str(tmp_path / "run"), *TINY]


# Where matplotlib is missing, a warning says so on standard error.
def errors(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines(keepends=True)
    return "".join(line for line in lines if "matplotlib" not in line)


def test_train_writes_a_model_that_eval_and_generate_take(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call, "--eval-every", "2"]) == OK
    out = capsys.readouterr().out
    assert "ternary weights" in out
    assert "step      2" in out
    assert "step      4" in out
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["validation"] is None for record in records] == [True, False, True, False]
    model = str(tmp_path / "run" / "model")
    assert main(["eval", model, "--max-tokens", "40", "--window", "16"]) == OK
    assert main(["generate", model, "--prompt", "3 and ", "--max-new-tokens", "2"]) == OK


@pytest.mark.parametrize("rule", ["dense", "ste"])
def test_a_baseline_is_written_as_a_dense_model(
    rule: str, call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*call, "--rule", rule, "--json"]) == OK
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 4
    assert result["skipped"] == 0
    assert result["validation"] > 0
    assert main(["eval", result["model"], "--max-tokens", "40", "--window", "16"]) == OK


def test_a_loss_that_is_not_finite_ends_with_its_step_and_code_1(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [*call, "--float-lr", "1e37", "--warmup", "0", "--save-every", "1"]
    assert main(broken) == FAILURE
    error = errors(capsys)
    assert error.startswith("ternarize: error: the loss of step 2 is nan, the state is that of step 1")
    assert error.count("\n") == 1
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert main([*broken, "--resume"]) == FAILURE
    assert checkpoint.read_bytes() == before
    assert main([*broken, "--resume", "--skip-nonfinite"]) == OK


def test_steps_that_changed_nothing_are_told_at_the_end(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*call, "--float-lr", "1e37", "--warmup", "0", "--skip-nonfinite"]) == OK
    assert "warning: 3 of 4 steps changed nothing" in errors(capsys)


def test_a_finished_run_whose_log_is_gone_is_written_again(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(call) == OK
    (tmp_path / "run" / "log.jsonl").unlink()
    capsys.readouterr()
    assert main([*call, "--resume", "--json"]) == OK
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 4
    assert result["loss"] is result["seconds_per_step"] is None


def test_an_interrupted_run_says_how_to_go_on(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: Any, **_: Any) -> bool:
        (tmp_path / "run" / "log.jsonl").touch()
        return False

    with monkeypatch.context() as patch:
        patch.setattr("ternarize.cli.train.train", interrupted)
        assert main(call) == 130
    assert "the same call with --resume goes on" in errors(capsys)
    assert main([*call, "--resume"]) == OK


@pytest.mark.parametrize("verb", ["train", "smoke"])
def test_a_verb_is_a_module_too(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [f"{verb}.py", "--help"])
    with pytest.raises(SystemExit, match=str(OK)):
        runpy.run_module(f"ternarize.{verb}", run_name="__main__")
    assert f"usage: ternarize {verb} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--text", "no-such-file"], FAILURE, "no-such-file cannot be read or written (No such file or directory)"),
        (["--text", "/dev/null"], USAGE, "the train text has 0 tokens"),
        (["--validation", "/dev/null"], USAGE, "the validation text has 0 tokens"),
        (["--tokenizer", "/dev/null"], USAGE, "is no tokenizer file"),
        (["--model", "/dev/null"], FAILURE, "is no config"),
        (["--hidden", "100"], USAGE, "hidden is 100: use a multiple of 64"),
        (["--layers", "0"], USAGE, "layers is 0"),
        (["--ctx", "0"], USAGE, "ctx is 0"),
        (["--group-size", "3"], USAGE, "group_size 3 is not a positive multiple of 4"),
        (["--save-every", "0"], USAGE, "--save-every is 0"),
        (["--seed", "-1"], USAGE, "seed is -1"),
        (["--rule", "sign", "--accumulator", "int4"], USAGE, "drop it under 'sign'"),
        (["--resume"], FAILURE, "holds no run to resume"),
    ],
)
def test_a_wrong_call_of_train_is_one_line(
    arguments: list[str],
    code: int,
    message: str,
    call: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*call, *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ternarize: error:")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_transformers_does_not_know_is_named_without_all_that_it_knows(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "nonsense"}')
    assert main([*call, "--model", str(config)]) == FAILURE
    message = f"{config} is no config of a transformers model (model_type is 'nonsense'): give a config.json"
    assert capsys.readouterr().err == f"ternarize: error: {message}\n"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("foo", "'foo' is no device"),
        ("meta", "'meta' is no device to run on: write cpu, cuda or cuda:0"),
        pytest.param(
            "cuda",
            "there is no cuda: PyTorch sees 0",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    device: str, message: str, call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=str(USAGE)):
        main([*call, "--device", device])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
