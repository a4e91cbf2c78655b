"""The verb convert: its report, its warnings, and refusals of what is asked for, one line with an exit code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ternarize.checkpoint.source import read_json
from ternarize.cli import FAILURE, USAGE, main
from tests.bitnet_kit import pack_as_bitnet
from tests.cli.convert_kit import refused


def test_json_is_one_object_with_the_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--json", "--group-size", "32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["planes"] == 3
    assert sum(layer["reason"] is None for layer in report["layers"]) == 14
    assert report["bytes_after"] < report["bytes_before"]
    assert "perplexity" not in report


def test_summary_names_what_was_kept_and_why(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for words in ("safetensors", "layers converted", "14", "Embedding, not a linear layer", "bits a ternary weight"):
        assert words in out


def test_options_reach_the_layers(source: Path, tmp_path: Path) -> None:
    options = [
        "--planes",
        "2",
        "--group-size",
        "-1",
        "--exclude",
        "mlp",
        "--dtype",
        "float16",
        "--max-shard-size",
        "9KB",
    ]
    assert main(["convert", str(source), str(tmp_path / "out"), *options]) == 0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == "float16"
    assert (config["quantization_config"]["planes"], config["quantization_config"]["group_size"]) == (2, -1)
    weight_map = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert not any("mlp" in name and name.endswith(".T_packed") for name in weight_map)
    assert len(set(weight_map.values())) > 2


def test_one_plane_warns_with_both_perplexities(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--planes", "1", "--json"]) == 0
    captured = capsys.readouterr()
    measured = json.loads(captured.out)["perplexity"]
    assert measured["source"] > 1
    assert measured["converted"] > 1
    assert 2000 < measured["tokens"] <= 2048
    assert "not usable without training" in captured.err
    # transformers shows progress of its own before it.
    assert f"{measured['converted']:.4g}" in captured.err.splitlines()[-1]


def test_no_eval_still_warns(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--planes", "1", "--json", "--no-eval"]) == 0
    captured = capsys.readouterr()
    assert "perplexity" not in json.loads(captured.out)
    assert "not usable without training" in captured.err


def test_without_options_config_says_how_weights_were_rounded(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    quantization = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    wanted = {"planes": 3, "group_size": 128, "init": "least_squares", "activation": "float"}
    assert {name: quantization[name] for name in wanted} == wanted


def test_exact_is_one_plane_that_needs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"up.weight": torch.randint(-1, 2, (64, 256)) * 0.3}, tmp_path / "dense.safetensors")
    call = ["convert", str(tmp_path / "dense.safetensors"), str(tmp_path / "out"), "--init", "exact", "--json"]
    assert main(call) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["planes"], report["mean_weight_error"]) == (1, 0)
    assert "perplexity" not in report
    assert "training" not in captured.err
    assert main([*call[:3], "--force"]) == 0
    assert "--init exact keeps them" in capsys.readouterr().err
    assert main([*call, "--planes", "3", "--force"]) == USAGE
    assert "init='exact' keeps weights that are ternary already in one plane: planes=3" in capsys.readouterr().out
    save_file({"up.weight": torch.randn(64, 256)}, tmp_path / "dense.safetensors")
    assert main([*call, "--force"]) == FAILURE
    assert "up.weight is not ternary" in json.loads(capsys.readouterr().out)["error"]


def test_a_packed_bitnet_needs_no_options(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_as_bitnet(source, tmp_path / "packed")
    assert main(["convert", str(tmp_path / "packed"), str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mean_weight_error"] == 0
    assert "training" not in captured.err
    call = ["convert", str(tmp_path / "packed"), str(tmp_path / "other"), "--planes", "3", "--json"]
    assert main(call) == USAGE
    assert "is ternary already" in json.loads(capsys.readouterr().out)["error"]


def test_trainable_writes_where_training_starts(source: Path, tmp_path: Path) -> None:
    call = ["convert", str(source), str(tmp_path / "out"), "--planes", "1", "--trainable", "--no-eval"]
    assert main(call) == 0
    state = load_file(tmp_path / "out" / "training_state.safetensors")
    assert state["model.layers.0.mlp.up_proj.T_accum"].any()


def test_eval_measures_both_models_on_the_given_text(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 4)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--json", "--eval", str(tmp_path / "text.txt")]
    assert main(arguments) == 0
    measured = json.loads(capsys.readouterr().out)["perplexity"]
    assert measured["converted"] == pytest.approx(measured["source"], rel=0.1)


def test_bare_weights_say_that_perplexity_was_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"up.weight": torch.randn(8, 8)}, tmp_path / "bare.safetensors")
    assert main(["convert", str(tmp_path / "bare.safetensors"), str(tmp_path / "out"), "--planes", "1", "--json"]) == 0
    assert "no causal language model" in json.loads(capsys.readouterr().out)["perplexity"]["not_measured"]


def test_existing_output_is_kept_and_force_is_suggested(
    source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, tmp_path, source, packed)
    assert code == 1
    assert "--force" in line


def test_force_replaces_the_output_whole(source: Path, packed: Path, tmp_path: Path) -> None:
    (packed / "left_over.txt").touch()
    assert main(["convert", str(source), str(packed), "--planes", "2", "--force", "--quiet"]) == 0
    assert read_json(packed / "config.json")["quantization_config"]["planes"] == 2
    assert not (packed / "left_over.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed"]


def test_force_never_replaces_what_is_no_checkpoint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    code, line = refused(capsys, tmp_path, source, tmp_path / "thesis", "--force")
    assert (code, "remove it yourself" in line) == (1, True)


def test_failed_force_leaves_the_old_output(
    source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, line = refused(capsys, tmp_path, source, packed, "--force")
    assert (code, "model.layers.1.mlp.up_proj" in line) == (1, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group-size", "30"], "multiple of 4"),
        (["--max-shard-size", "big"], "'big'"),
        (["--include", "("], "no regular expression"),
        (["--planes", "4"], "--planes"),
        (["--trainable"], "trainable needs one trit plane, not 3"),
        (["--eval", "a.txt", "--no-eval"], "not allowed with"),
    ],
)
def test_wrong_options_are_usage_errors(
    options: list[str], words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, tmp_path, source, tmp_path / "out", *options)
    assert words in line
    assert code == 2
