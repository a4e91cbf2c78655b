"""Run folders that something happened to, and disks that are full: one line, and nothing is lost."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ternarize.cli import FAILURE, OK, USAGE, main
from ternarize.errors import CheckpointError
from ternarize.train.checkpoint import load_checkpoint, save_checkpoint
from ternarize.train.curves import read_log
from ternarize.train.run import Source, export
from ternarize.train.tokenizer import byte_tokenizer
from tests.train.kit import VARIANTS, Tiny

SIZES = ["--hidden", "64", "--layers", "1", "--ctx", "16", "--batch", "2", "--steps", "4", "--save-every", "2"]


@pytest.fixture
def call(text: Path, tmp_path: Path) -> list[str]:
    return ["train", "--text", str(text), "--out", str(tmp_path / "run"), *SIZES, "--device", "cpu"]


@pytest.fixture
def run(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(call) == OK
    capsys.readouterr()
    return tmp_path / "run"


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond some bytes, as on a full disk."""
    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a call that fails."""
    assert main(call) == FAILURE
    error = capsys.readouterr().err
    assert error.startswith("ternarize: error:")
    assert error.count("\n") == 1
    return error


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [remove, empty, halve, flip, make_folder])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "checkpoint.pt"])
def test_a_run_with_a_damaged_file_is_not_resumed_and_nothing_is_lost(
    name: str, damage: Callable[[Path], None], call: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / name)
    if (name, damage) == ("checkpoint.pt", remove):
        # As of a run that stopped before its first.
        assert main([*call, "--resume"]) == OK
        return
    before = contents(run)
    error = refused([*call, "--resume"], capsys)
    assert str(run / name) in error
    assert contents(run) == before


def test_changed_tokens_are_named_with_what_is_expected(
    call: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (run / "train.bin").stat().st_size
    kept = (run / "train.bin").read_bytes()
    halve(run / "train.bin")
    error = refused([*call, "--resume"], capsys)
    assert f"train.bin was changed since its run began, its bytes are {size // 2}, were {size}: put the file" in error
    (run / "train.bin").write_bytes(kept)
    flip(run / "train.bin")
    error = refused([*call, "--resume"], capsys)
    assert "its sha256 are " in error
    (run / "train.bin").write_bytes(kept)
    assert main([*call, "--resume"]) == OK


def test_a_folder_without_a_run_file_holds_no_run(
    call: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").unlink()
    assert f"{run} holds no run to resume, it has no run.json" in refused([*call, "--resume"], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "run.json is damaged"),
        ("{}", "run.json is damaged (KeyError('settings'))"),
        ("[]", "run.json is damaged"),
        ("[" * 10**5, "Recursion"),
    ],
)
def test_a_run_file_of_something_else_is_one_line(
    content: str, message: str, call: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text(content)
    assert message in refused([*call, "--resume"], capsys)


def shorten(state: dict[str, Any]) -> None:
    state["model"]["model.layers.0.self_attn.q_proj.T_packed"] = torch.zeros(1, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model"), "holds no state of this run ('model')"),
        (lambda state: state.update(step="x"), "holds no state of this run"),
        (lambda state: state.update(step=5), "holds no state of this run (its step is 5 of 4)"),
        (lambda state: state.update(optimizer={}), "holds no state of this run ('param_groups')"),
        (shorten, "size mismatch for model.layers.0.self_attn.q_proj.T_packed"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(
    change: Callable[[dict[str, Any]], object],
    message: str,
    call: list[str],
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = load_checkpoint(run / "checkpoint.pt")
    change(state)
    save_checkpoint(run / "checkpoint.pt", state)
    assert message in refused([*call, "--resume"], capsys)


@pytest.mark.parametrize(
    "where",
    ["transformers.AutoModelForCausalLM.from_config", "torch.load", "ternarize.train.run.Trainer.load_state_dict"],
)
def test_too_little_memory_is_no_fault_of_a_file(
    where: str, call: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(where, Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    assert refused([*call, "--resume"], capsys).startswith("ternarize: error: out of memory (CUDA out of memory.)")


def test_too_little_memory_is_no_full_disk(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.start(VARIANTS["ste"]).model
    monkeypatch.setattr("ternarize.train.run.bake", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        export(model, Source(texts=(tiny.text,)), tiny.path / "model")


@pytest.mark.parametrize("line", [b"\xff\x00", b"5", b"[]", b'{"step": 1}', b'{"step": 2, "los'])
def test_a_damaged_line_of_the_log_costs_no_other(line: bytes, call: list[str], run: Path) -> None:
    log = run / "log.jsonl"
    records = read_log(log)
    first, rest = log.read_bytes().split(b"\n", 1)
    log.write_bytes(first + b"\n" + line + b"\n" + rest)
    assert main([*call, "--resume"]) == OK
    assert [json.loads(text) for text in log.read_text().splitlines()] == records


def test_a_full_disk_is_one_line_and_leaves_the_former_checkpoint(tmp_path: Path, limit: Callable[[int], None]) -> None:
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, {"step": torch.tensor(1)})
    for size in (100, 10_000, 30_000):
        limit(size)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be written, its disk may be full .*--resume"):
            save_checkpoint(file, {"step": torch.zeros(10_000)})
    assert load_checkpoint(file)["step"] == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(
    call: list[str], tmp_path: Path, limit: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    limit(1000)
    assert f"{tmp_path / 'run'} cannot be read or written (File too large)" in refused(call, capsys)
    assert not (tmp_path / "run").exists()
    limit(50_000)
    assert f"{tmp_path / 'run' / 'checkpoint.pt'} cannot be written" in refused(call, capsys)
    limit(former)
    assert main([*call, "--resume"]) == OK


@pytest.mark.parametrize("rule", ["int8", "dense"])
def test_a_model_that_a_full_disk_has_no_room_for_leaves_the_former_one(
    rule: str, tiny: Tiny, limit: Callable[[int], None]
) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    destination, source = tiny.path / "model", Source(texts=(tiny.text,))
    model = tiny.start(VARIANTS[rule]).model
    export(model, source, destination)
    before = contents(destination)
    # The sizes of the weights, the tokenizer and the configuration lie between these.
    for size in (50, 900, 3000, 20_000, 100_000):
        limit(size)
        with pytest.raises((CheckpointError, OSError), match=r"model cannot be written|File too large.*model"):
            export(model, source, destination)
        limit(former)
        assert contents(destination) == before
        assert {path.name for path in tiny.path.iterdir()} == {"model", "run"}


def test_another_tokenizer_of_the_same_name_is_another_run(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer = byte_tokenizer()
    tokenizer.save(str(file))
    call += ["--tokenizer", str(file)]
    assert main(call) == OK
    assert main([*call, "--resume"]) == OK
    tokenizer.decoder = None
    tokenizer.save(str(file))
    capsys.readouterr()
    assert main([*call, "--resume"]) == USAGE
    assert "is a run of other settings: tokenizer_sha256 is" in capsys.readouterr().err
