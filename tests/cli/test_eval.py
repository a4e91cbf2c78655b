import json
import shutil
from pathlib import Path

import pytest
from torch._inductor import config as inductor_config

from ternarize.checkpoint import convert
from ternarize.cli import FAILURE, OK, USAGE, main
from ternarize.config import TernaryConfig
from ternarize.evaluate import load, perplexity, sample_text


def test_eval_prints_what_perplexity_measures(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_checkpoint), "--max-tokens", "100", "--window", "32", "--json"]) == OK
    result = json.loads(capsys.readouterr().out)
    model, tokenizer = load(tiny_checkpoint)
    expected = perplexity(model, tokenizer, sample_text(), window=32, max_tokens=100)
    assert result["perplexity"] == pytest.approx(expected.perplexity)
    assert result["tokens"] == expected.tokens == 96
    assert result["seconds"] > 0


def test_a_compiled_packed_model_has_the_perplexity_of_an_eager_one(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny_checkpoint, tmp_path / "packed", TernaryConfig(planes=3, group_size=32))
    call = ["eval", str(tmp_path / "packed"), "--max-tokens", "40", "--json"]
    perplexities = []
    # What is vectorised takes the C++ compiler longest.
    with inductor_config.patch({"cpp.simdlen": 1}):
        for options in ([], ["--compile"]):
            assert main([*call, *options]) == OK
            perplexities.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-4)


def test_eval_reads_a_text_file_and_prints_a_table(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox", encoding="utf-8")
    assert main(["eval", str(tiny_checkpoint), "--text", str(text)]) == OK
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert " 18 " in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--window", "1"], USAGE, "window is 1"),
        (["--max-tokens", "1"], USAGE, "--max-tokens is 1"),
        (["--text", "no-such-file"], FAILURE, "no-such-file"),
        (["--text", "/dev/null"], USAGE, "0 tokens"),
    ],
)
def test_a_wrong_call_of_eval_is_one_line(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["eval", str(tiny_checkpoint), *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ternarize: error:")
    assert error.count("\n") == 1


@pytest.mark.parametrize("verb", [["eval", "--text"], ["convert", "out", "--eval"]], ids=lambda verb: verb[0])
def test_binary_text_is_named_with_where_it_is_broken(
    verb: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"abc\xff")
    name, *arguments = verb
    assert main([name, str(tiny_checkpoint), *arguments, str(text)]) == USAGE
    assert f"{arguments[-1]} {text} is not UTF-8 text (invalid start byte at byte 3)" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": []}', '{"quantization_config": "x"}'])
def test_eval_of_a_model_with_a_broken_config_is_one_line(
    config: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "dense")
    (folder / "config.json").write_text(config)
    assert main(["eval", str(folder)]) == FAILURE
    error = capsys.readouterr().err
    assert error.startswith("ternarize: error:")
    assert error.count("\n") == 1


def test_eval_of_what_is_no_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path / "nowhere"), "--json"]) == FAILURE
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert "does not exist" in result["error"]
