"""Checkpoints that transformers packed by its quant_method "bitnet"."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ternarize import TernaryLinear, dequantize
from ternarize.checkpoint import convert, from_pretrained, open_checkpoint
from ternarize.config import TernaryConfig
from ternarize.errors import CheckpointError, ConfigError
from tests.bitnet_kit import pack_as_bitnet

LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("quantization", "mantissas"),
    [({}, torch.int32), ({"linear_class": "autobitlinear", "quantization_mode": "offline"}, torch.uint8)],
    ids=["divide", "multiply"],
)
def test_every_weight_and_the_rounding_of_inputs_come_over(
    quantization: dict[str, Any], mantissas: torch.dtype, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    weights = pack_as_bitnet(tiny_checkpoint, tmp_path / "packed", **quantization)
    report = convert(tmp_path / "packed", tmp_path / "out")
    assert (report.source_format, report.mean_weight_error, len(report.converted)) == ("bitnet", 0, 14)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert report.bytes_before == sum(tensor.nbytes for tensor in stored.values())
    assert (tmp_path / "out" / "generation_config.json").exists()
    model = from_pretrained(tmp_path / "out")
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, TernaryLinear)
    assert (layer.activation, layer.E.shape) == ("int8", (layer.out_features, 1))
    assert layer.E_mantissa is not None
    assert layer.E_mantissa.dtype == mantissas
    made = dequantize(model, torch.float32).state_dict()
    for name, weight in weights.items():
        assert torch.equal(made[name], weight), name


def test_a_layer_computes_what_bitlinear_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack_as_bitnet(tiny_checkpoint, tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    convert(tmp_path / "packed", tmp_path / "out")
    layer = from_pretrained(tmp_path / "out").get_submodule(LAYER)
    assert isinstance(layer, TernaryLinear)
    packed, scale = tensors[f"{LAYER}.weight"], tensors[f"{LAYER}.weight_scale"]
    x = torch.randn(5, layer.in_features)
    # BitLinear.activation_quant and post_quant_process, in float64.
    input_scale = 127 / x.abs().amax(-1, keepdim=True)
    q = (x * input_scale).round().clamp(-128, 127).double()
    T = torch.cat([(packed >> 2 * i) & 3 for i in range(4)]).double() - 1
    expected = q @ T.t() / (input_scale.double() * scale.double())
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-6, rtol=1e-5)


def test_it_is_not_rounded_by_mistake(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack_as_bitnet(tiny_checkpoint, tmp_path / "packed")
    for config in (TernaryConfig(planes=3), TernaryConfig(init="exact")):
        with pytest.raises(ConfigError, match="--init exact --activation int8"):
            convert(tmp_path / "packed", tmp_path / "out", config)
    convert(tmp_path / "packed", tmp_path / "out", TernaryConfig(init="exact", activation="int8"))
    assert not (tmp_path / "out" / "training_state.safetensors").exists()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"use_rms_norm": True}, "has a norm in each of its linear layers"),
        ({"linear_class": "autobitlinear", "quantization_mode": "online"}, "rounded while the model runs"),
    ],
)
def test_layers_that_are_more_than_a_packed_matrix_are_refused(
    quantization: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pack_as_bitnet(tiny_checkpoint, tmp_path / "packed", **quantization)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "packed")


def test_damage_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    pack_as_bitnet(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{LAYER}.weight_scale": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight is uint8 .* scale of float32 \[3\]"):
        open_checkpoint(folder)
    tensors[f"{LAYER}.weight"][1, 2] = 0b1100
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight holds the code 3"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
