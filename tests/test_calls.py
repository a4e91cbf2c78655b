import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from ternarize import TernaryConfig, ternarize
from ternarize.calls import Call, calls_of_folder, calls_of_model, calls_of_shapes
from ternarize.checkpoint import convert, save_pretrained
from ternarize.errors import CheckpointError
from ternarize.passes.insert_finite_guard import layer_calls
from ternarize.passes.manager import run_on_dynamo_graph
from tests.conftest import tiny_llama

CONFIG = TernaryConfig(planes=3, group_size=32)

#: Of `tiny_llama`: q, k, v; o; gate, up; down.
TINY = [[(64, 64), (32, 64), (32, 64)], [(64, 64)], [(96, 64), (96, 64)], [(64, 96)]]


def shapes(calls: list[Call]) -> list[list[tuple[int, int]]]:
    return [[(layer.out_features, layer.in_features) for layer in call] for call in calls]


def test_calls_are_those_that_a_compiled_graph_makes() -> None:
    model = ternarize(tiny_llama(), CONFIG, trainable=False)
    seen: list[list[tuple[int, int]]] = []

    def note(graph_module: fx.GraphModule, _: Any) -> Any:
        run_on_dynamo_graph(graph_module)
        for node, _ in layer_calls(graph_module.graph):
            packed: Any = node.args[1]
            values = [argument.meta["example_value"] for argument in packed]
            seen.append([(value.shape[-2], 4 * value.shape[-1]) for value in values])
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=note)(torch.zeros(1, 5, dtype=torch.int64), use_cache=False)
    torch._dynamo.reset()
    # Twice, once a layer.
    assert seen == TINY * 2
    assert shapes(calls_of_model(model)) == TINY


def test_a_packed_folder_and_a_dense_one_give_the_same_calls_without_reading_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_checkpoint, tmp_path / "packed", CONFIG)

    def read(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr("ternarize.checkpoint.safetensors_files.SafetensorsFiles.load", read)
    packed = calls_of_folder(tmp_path / "packed", TernaryConfig())
    assert shapes(packed) == TINY
    assert {layer.config.planes for call in packed for layer in call} == {3}
    assert {layer.config.group_size for call in packed for layer in call} == {32}
    assert shapes(calls_of_folder(tiny_checkpoint, CONFIG)) == TINY


def test_experts_that_run_by_the_values_of_their_input_are_calls_of_one_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Routed(nn.Module):
        dummy_inputs = {"x": torch.zeros(2, 32)}  # noqa: RUF012  # as transformers has it

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 8), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.a(x) if x.sum() > 0 else self.b(x)
            return out

    with caplog.at_level(logging.WARNING):
        calls = calls_of_model(ternarize(Routed(), trainable=False))
    assert shapes(calls) == [[(8, 32)], [(16, 32)]]
    assert "Routed does not run without data" in caplog.text


def test_a_folder_of_no_transformers_model_gives_its_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pretrained(ternarize(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))), tmp_path / "packed")
    with caplog.at_level(logging.WARNING):
        calls = calls_of_folder(tmp_path / "packed", CONFIG)
    assert shapes(calls) == [[(8, 64)], [(4, 8)]]
    assert all(layer.bias for call in calls for layer in call)
    assert "names no transformers model" in caplog.text


def test_a_folder_of_something_else_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config"):
        calls_of_folder(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(CheckpointError, match="no model_type 'no such'"):
        calls_of_folder(tmp_path, CONFIG)


def test_shapes_are_read() -> None:
    calls = calls_of_shapes("8x64,8x64,4x64+16x64", CONFIG)
    assert shapes(calls) == [[(8, 64)], [(4, 64), (16, 64)]]
    assert calls[0][0].config == CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "'8' is no shape"),
        ("8x", "'8x' is no shape"),
        ("0x8", "'0x8' is no shape"),
        ("8x8,", "'' is no shape"),
        ("8x8+8x16", "different in_features"),
    ],
)
def test_what_is_no_shape_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calls_of_shapes(text, CONFIG)
