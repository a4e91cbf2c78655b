"""Damaged and odd files: whatever is in them, the answer is one line that says what to do, or a sound conversion."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ternarize.checkpoint import convert, open_checkpoint
from ternarize.errors import CheckpointError, TernarizeError

TENSORS = {"a.weight": torch.randn(8, 8), "a.bias": torch.randn(8), "b.weight": torch.randn(8, 4).to(torch.bfloat16)}


def write_safetensors(file: Path) -> Path:
    save_file(TENSORS, file.with_suffix(".safetensors"))
    return file.with_suffix(".safetensors")


def write_torch(file: Path) -> Path:
    torch.save(TENSORS, file.with_suffix(".pt"))
    return file.with_suffix(".pt")


def write_legacy_torch(file: Path) -> Path:
    torch.save(TENSORS, file.with_suffix(".pth"), _use_new_zipfile_serialization=False)
    return file.with_suffix(".pth")


def read_all(path: Path) -> None:
    source = open_checkpoint(path)
    for name in source.tensors:
        source.load(name)


@pytest.mark.parametrize("write", [write_safetensors, write_torch, write_legacy_torch])
def test_any_damage_to_a_file_is_a_checkpoint_error_of_one_line(write: Callable[[Path], Path], tmp_path: Path) -> None:
    file = write(tmp_path / "x")
    content = file.read_bytes()
    read_all(file)
    generator = random.Random(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(content)
        # Headers, pickles and directories lie at the two ends.
        for _ in range(generator.choice((1, 2, 5))):
            damaged[generator.choice((1, -1)) * generator.randrange(min(600, len(content)))] = generator.randrange(256)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        try:
            read_all(file)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


def test_files_of_torch_before_1_6_are_read(tmp_path: Path) -> None:
    source = open_checkpoint(write_legacy_torch(tmp_path / "x"))
    assert source.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(source.load(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(4).to_sparse(), torch.ones(4, 4, device="meta"), torch.ones(4, 4, dtype=torch.complex64)],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_that_are_no_dense_numbers_are_named(tensor: Tensor, tmp_path: Path) -> None:
    torch.save({"a.weight": tensor}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' is .*: save it as a dense tensor"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"odd.weight": torch.ones(0, 4)}, "it is empty"),
        ({"odd.weight": torch.ones(4, 0)}, "it is empty"),
        ({"odd.weight": torch.ones(4, 4), "odd.bias": torch.ones(4, 1)}, "its bias is float32 [4, 1]"),
        ({"odd.weight": torch.ones(4, 4), "odd.bias": torch.ones(3)}, "its bias is float32 [3]"),
        ({"odd.weight": torch.ones(4, 4), "odd.bias": torch.ones(4, dtype=torch.int8)}, "its bias is int8 [4]"),
        ({"odd.weight": torch.ones(4, 4), "odd.E": torch.ones(4)}, "the source has a tensor 'odd.E' already"),
    ],
)
def test_layers_that_the_format_has_no_place_for_stay_dense(
    tensors: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    save_file({"a.weight": torch.randn(4, 4), **tensors}, tmp_path / "x.safetensors")
    report = convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert [layer.name for layer in report.converted] == ["a"]
    assert {layer.name: layer.reason for layer in report.kept} == {"odd": reason}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


CONFIGS = [
    "",
    "[]",
    "null",
    "\xff",
    "[" * 100_000,
    '{"quantization_config": "x"}',
    '{"quantization_config": {"quant_method": "ternarize"}}',
]


@pytest.mark.parametrize("text", CONFIGS, ids=[text[:40] for text in CONFIGS])
def test_a_config_that_is_none_is_refused(text: str, packed_source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packed_source, tmp_path / "packed")
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"config\.json[^\n]*$"):
        read_all(folder)


@pytest.mark.parametrize(
    "change",
    [{"model_type": []}, {"model_type": 5}, {"architectures": [5]}, {"architectures": 5}, {"hidden_size": "x"}],
)
def test_a_config_that_transformers_cannot_build_leaves_names_and_shapes(
    change: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "dense")
    edit_json(folder / "config.json", lambda config: config.update(change))
    assert convert(folder, tmp_path / "out").identified_by.startswith("names and shapes (")


LAYER = "model.layers.0.self_attn.q_proj"
NO_WIDTHS: list[Any] = ["x", [], -3, 0, 63.5, 10**30, None]
NO_PLANES: list[Any] = [[], 3.0, True, 1]
WEIGHT_MAPS: list[Any] = [5, {}, {"a": []}, {"a": "b"}]


@pytest.mark.parametrize(
    "change",
    [
        {"modules": "x"},
        {"modules": [1]},
        {"modules": {LAYER: 5}},
        *({"modules": {LAYER: {"in_features": value}}} for value in NO_WIDTHS),
        *({"planes": value} for value in NO_PLANES),
        {"init": []},
        {"rule": {}},
        {"accumulator": None},
        {"format_version": "1"},
        {"packing": []},
    ],
    ids=str,
)
def test_a_quantization_config_that_means_nothing_is_refused(
    change: dict[str, Any], packed_source: Path, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    folder = shutil.copytree(packed_source, tmp_path / "packed")
    edit_json(folder / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises(CheckpointError, match=r"\A[^\n]+: [^\n]+\Z"):
        read_all(folder)


@pytest.mark.parametrize("index", ["[]", "{", *(json.dumps({"weight_map": files}) for files in WEIGHT_MAPS)])
def test_an_index_that_names_no_files_is_refused(index: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "dense")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(TernarizeError, match=r"\A[^\n]+: [^\n]+\Z"):
        read_all(folder)
