"""Names that mean something to what prints or draws them."""

import json
import shutil
from pathlib import Path

import pytest

from ternarize.cli import OK, main

TINY = ["--hidden", "64", "--layers", "1", "--ctx", "16", "--batch", "2", "--steps", "1", "--device", "cpu"]


@pytest.mark.parametrize("name", ["x[/b]", "[red]x", "a\\", "a$\\q$", "_a"])
def test_any_name_of_a_run_is_printed_and_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 4)
    folder = tmp_path / name
    assert main(["train", "--text", str(text), "--out", str(folder), *TINY]) == OK
    assert (folder / "model" / "config.json").is_file()
    assert f"the model is in {folder / 'model'}:" in capsys.readouterr().out


def test_any_name_of_a_model_is_printed(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, packed = tmp_path / "[/b]", tmp_path / "[red]"
    shutil.copytree(tiny_checkpoint, dense)
    assert main(["convert", str(dense), str(packed), "--group-size", "32"]) == OK
    assert main(["inspect", str(packed)]) == OK
    assert main(["eval", str(dense), "--max-tokens", "40"]) == OK
    out = capsys.readouterr().out
    assert "[red]" in out
    assert "[/b]" in out


def test_a_picture_that_cannot_be_drawn_costs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 4)
    call = ["train", "--text", str(text), "--out", str(tmp_path / "run"), *TINY, "--json"]
    assert main(call) == OK
    (tmp_path / "run" / "curves.png").unlink()
    (tmp_path / "run" / "curves.png").mkdir()
    capsys.readouterr()
    assert main([*call, "--resume"]) == OK
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 1
    assert "curves.png was not drawn (Is a directory)" in captured.err
