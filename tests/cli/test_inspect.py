"""The verb inspect: what it shows of each format, and what it finds wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ternarize.checkpoint import convert
from ternarize.cli import main
from ternarize.config import TernaryConfig
from ternarize.packing import unpack


@pytest.fixture
def packed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    convert(tiny_checkpoint, tmp_path / "packed", TernaryConfig(planes=2, group_size=32))
    return tmp_path / "packed"


def test_packed_layers_are_described_from_their_tensors(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["format"], result["checks"]["faults"]) == (True, "ternarize", [])
    assert result["checks"]["tensors_with_checksum"] == result["tensors"]
    assert result["quantization_config"]["planes"] == 2
    layer = next(layer for layer in result["layers"] if layer["name"] == "model.layers.0.mlp.down_proj")
    tensors = load_file(packed / "model.safetensors")
    T = unpack(tensors["model.layers.0.mlp.down_proj.T_packed"], 96, 32)
    E = tensors["model.layers.0.mlp.down_proj.E"]
    assert layer["shape"] == [64, 96]
    assert layer["trits"] == {str(trit): int(T.eq(trit).sum()) for trit in (-1, 0, 1)}
    assert layer["exponents"] == [int(E.min()), int(E.max())]
    assert layer["bits_per_weight"] == pytest.approx(4 + 8 / 32)


def test_tables_show_layers_and_tensors(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "ternary layers" in out
    assert "ok (" in out
    assert "uint8" in out


def test_dense_sources_are_counted_by_dtype(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_checkpoint), "--json", "--tensors"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "safetensors"
    assert "layers" not in result
    assert {entry["dtype"] for entry in result["tensor_list"]} == {"float32"}
    assert sum(entry["bytes"] for entry in result["tensor_list"]) == result["bytes"]


def flip(packed: Path, name: str) -> None:
    """Flip a bit of a tensor where it lies in the file."""
    file = packed / "model.safetensors"
    content = bytearray(file.read_bytes())
    wanted = load_file(file)[name].numpy().tobytes()
    content[content.index(wanted)] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.T_packed", "model.embed_tokens.weight"])
def test_damaged_tensor_is_named_and_the_rest_is_shown(
    name: str, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(packed, name)
    assert main(["inspect", str(packed), "--json"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert not result["ok"]
    assert len(result["checks"]["faults"]) == 1
    assert f"'{name}' does not match its checksum" in captured.err
    assert captured.err.count("\n") == 1
    assert len(result["layers"]) == (13 if name.endswith("T_packed") else 14)


@pytest.mark.parametrize(
    "spoil",
    [shutil.rmtree, lambda folder: (folder / "model.safetensors").unlink()],
)
def test_what_cannot_be_opened_is_one_line_and_exit_code_1(
    spoil: Callable[[Path], None], packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(packed)
    assert main(["inspect", str(packed)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
