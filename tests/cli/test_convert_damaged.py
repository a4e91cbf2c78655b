"""The verb convert on what it cannot read: each damage is refused in one line that names it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ternarize.checkpoint.source import read_json
from ternarize.checkpoint.write import write_json
from tests.cli.convert_kit import refused


class Unpicklable:
    """What weights_only refuses."""


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def no_matrices(folder: Path) -> None:
    empty_folder(folder)
    save_file({"norm.weight": torch.ones(4)}, folder / "model.safetensors")


def no_tensors(folder: Path) -> None:
    empty_folder(folder)
    save_file({}, folder / "model.safetensors")


def no_checkpoint(folder: Path) -> None:
    empty_folder(folder)
    (folder / "notes.txt").write_text("hello")


def pickled_object(folder: Path) -> None:
    empty_folder(folder)
    torch.save({"model": Unpicklable()}, folder / "model.pt")


def text_as_torch_file(folder: Path) -> None:
    empty_folder(folder)
    (folder / "model.pt").write_text("hello, this is no checkpoint")


def text_as_gguf(folder: Path) -> None:
    empty_folder(folder)
    (folder / "model.gguf").write_text("hello, this is no checkpoint")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate, "model.safetensors is no complete safetensors file"),
        (shutil.rmtree, "does not exist"),
        (empty_folder, "holds no weights"),
        (no_checkpoint, "holds no weights"),
        (no_matrices, "no weight matrix"),
        (no_tensors, "holds no tensors"),
        (pickled_object, "could run any code"),
        (text_as_torch_file, "is no complete file of torch.save"),
        (text_as_gguf, "is no GGUF file"),
        (broken_config, "config.json cannot be read as JSON"),
    ],
)
def test_unreadable_dense_sources_are_refused_in_one_line(
    spoil: Callable[[Path], None], words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(source)
    code, line = refused(capsys, tmp_path, source, tmp_path / "out")
    assert code == 1
    assert words in line


def test_source_without_permission_is_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    # The tests may run as root, whom no mode keeps out.
    monkeypatch.setattr("ternarize.checkpoint.safetensors_files.safe_open", denied)
    code, line = refused(capsys, tmp_path, source, tmp_path / "out")
    assert code == 1
    assert "permission denied" in line
    assert "model.safetensors" in line


def test_file_of_an_unknown_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").touch()
    code, line = refused(capsys, tmp_path, tmp_path / "model.onnx", tmp_path / "out")
    assert (code, "no checkpoint by its name" in line) == (1, True)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of a packed folder as a tool without checksums would."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def flip_last_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


LAYER = "model.layers.0.self_attn.q_proj"


def illegal_code(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[f"{LAYER}.T_packed"].fill_(0b10))


def illegal_exponent(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[f"{LAYER}.E"].fill_(-128))


def wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{LAYER}.E": tensors[f"{LAYER}.E"][:-1].clone()}))


def missing_exponents(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{LAYER}.other": tensors.pop(f"{LAYER}.E")}))


def change_quantization(folder: Path, **fields: Any) -> None:
    config = read_json(folder / "config.json")
    config["quantization_config"] |= fields
    write_json(folder / "config.json", config)


def unknown_version(folder: Path) -> None:
    change_quantization(folder, format_version=99)


def unknown_packing(folder: Path) -> None:
    change_quantization(folder, packing="base3")


def wrong_group_size(folder: Path) -> None:
    change_quantization(folder, group_size=64)


def text_for_group_size(folder: Path) -> None:
    change_quantization(folder, group_size="32")


def indivisible(folder: Path) -> None:
    change_quantization(folder, modules={LAYER: {"in_features": 57}})


def layer_without_tensors(folder: Path) -> None:
    change_quantization(folder, modules={"no.such.layer": {"group_size": 64}})


SPOILT_PACKED = [
    (truncate, "model.safetensors is no complete safetensors file"),
    (flip_last_byte, "does not match its checksum"),
    (illegal_code, f"'{LAYER}.T_packed' holds the code 10"),
    (illegal_exponent, f"'{LAYER}.E' holds the exponent -128"),
    (wrong_shape, f"'{LAYER}.E' is int8 [63, 2], need int8 [64, 2]"),
    (missing_exponents, f"'{LAYER}.E' is missing"),
    (unknown_version, "format_version is 99"),
    (unknown_packing, "packing is 'base3'"),
    (wrong_group_size, "group_size 64"),
    (text_for_group_size, "group_size is '32', need an integer"),
    (indivisible, f"'{LAYER}.T_packed' is uint8 [3, 64, 16], need uint8 [3, 64, 15]"),
    (layer_without_tensors, "'no.such.layer'"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT_PACKED)
def test_damaged_packed_sources_are_refused_in_one_line(
    spoil: Callable[[Path], None], words: str, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(packed)
    code, line = refused(capsys, tmp_path, packed, tmp_path / "out")
    assert code == 1
    assert words in line
