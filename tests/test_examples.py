"""The examples, on tiny input, in this process."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from torch._inductor import config as inductor_config

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    # What is vectorised takes the C++ compiler longest.
    with inductor_config.patch({"cpp.simdlen": 1}):
        yield importlib.import_module(request.param)


@pytest.mark.parametrize("example", ["swap_and_compile"], indirect=True)
def test_swap_and_compile_trains_and_runs_a_compiled_model(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(["--hidden", "32", "--layers", "1", "--steps", "4"])
    out = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "logits [4, 64, 512]" in out
    assert "model.layers.0.mlp.up_proj (inference): torch" in out


@pytest.mark.parametrize("example", ["convert_and_generate"], indirect=True)
def test_convert_and_generate_writes_a_packed_folder_and_text(
    example: ModuleType, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([str(tiny_checkpoint), str(tmp_path / "packed"), "--prompt", "hello", "--max-new-tokens", "4"])
    assert '"ternarize"' in (tmp_path / "packed" / "config.json").read_text()
    assert capsys.readouterr().out


@pytest.mark.parametrize("example", ["train_byte_model"], indirect=True)
def test_train_byte_model_lowers_both_losses(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("so the day, so the night; " * 100)
    arguments = ["--hidden", "32", "--layers", "1", "--context", "32", "--batch", "4", "--steps", "30"]
    example.main(["--text", str(text), *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if "at the start" in line]
    assert [line.split(":")[0] for line in lines] == ["ternary", "dense"]
    for line in lines:
        first, last = float(line.split()[1]), float(line.split()[-4])
        assert first == pytest.approx(5.55, abs=0.15)
        assert last < first - 0.5


@pytest.mark.parametrize("example", ["demo"], indirect=True)
def test_the_demo_ends_in_one_table(
    example: ModuleType, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--window", "32", "--windows", "2", "--new-tokens", "4", "--steps", "2", "--hidden", "16"]
    code = example.main([str(tiny_checkpoint), str(tmp_path / "packed"), "--group-size", "32", *sizes])
    out = capsys.readouterr().out
    table = out[out.index("a byte model from scratch") :]
    assert code == 0
    for row in (
        "bytes, files",
        "perplexity, 62 tokens",
        "tokens/s, writing",
        "torch x 14",
        "after 2 steps, unseen text",
    ):
        assert row in table
