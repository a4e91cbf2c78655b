"""Models to folders and back, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from ternarize import TernaryConfig, from_pretrained, load_into, save_pretrained, ternarize
from ternarize.checkpoint import convert, open_checkpoint
from ternarize.errors import CheckpointError, ConfigError, ConversionError
from ternarize.layer import TRAINING_STATE, TernaryLinear, ternary_layers


def tiny_ternary(folder: Path, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return ternarize(LlamaForCausalLM.from_pretrained(folder), TernaryConfig(group_size=32, **options))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))


def assert_same_state(left: nn.Module, right: nn.Module, *, training: bool) -> None:
    def kept(model: nn.Module) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if training or name.rpartition(".")[2] not in TRAINING_STATE
        }

    a, b = kept(left), kept(right)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def test_round_trip_of_the_state_is_bit_equal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = tiny_ternary(tiny_checkpoint)
    save_pretrained(model, tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out")
    assert_same_state(model, loaded, training=False)
    assert not loaded.training
    x = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("options", [{}, {"accumulator": "int4"}, {"rule": "sign"}], ids=["int8", "int4", "sign"])
def test_training_state_comes_back_bit_equal(options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = tiny_ternary(tiny_checkpoint, **options)
    generator = torch.Generator().manual_seed(0)
    for _, layer in ternary_layers(model):
        for name in TRAINING_STATE:
            plane = getattr(layer, name)
            if plane is not None:
                plane.copy_(torch.randint(-100, 100, plane.shape, generator=generator))
    save_pretrained(model, tmp_path / "out", training_state=True)
    assert (tmp_path / "out" / "training_state.safetensors").is_file()
    assert_same_state(model, from_pretrained(tmp_path / "out", trainable=True), training=True)
    assert_same_state(model, from_pretrained(tmp_path / "out"), training=False)


def test_without_stored_training_state_layers_start_fresh(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_pretrained(tiny_ternary(tiny_checkpoint), tmp_path / "out")
    assert not (tmp_path / "out" / "training_state.safetensors").exists()
    for _, layer in ternary_layers(from_pretrained(tmp_path / "out", trainable=True)):
        assert layer.T_accum is not None
        assert not layer.T_accum.any()


def test_converted_layers_have_no_float_state(packed_source: Path) -> None:
    layers = list(ternary_layers(from_pretrained(packed_source)))
    assert len(layers) == 14
    for _, layer in layers:
        assert not any(parameter.is_floating_point() for parameter in layer.parameters())


def test_several_planes_cannot_be_loaded_trainable(packed_source: Path) -> None:
    with pytest.raises(ConfigError, match="3 trit planes"):
        from_pretrained(packed_source, trainable=True)


def test_dtype_casts_floats_and_leaves_computed_buffers(packed_source: Path) -> None:
    model = from_pretrained(packed_source, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert model.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32
    assert all(layer.dtype == torch.bfloat16 for _, layer in ternary_layers(model))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mapped files")
def test_loaded_models_do_not_keep_their_file_mapped(packed_source: Path) -> None:
    model = from_pretrained(packed_source)
    assert str(packed_source) not in Path("/proc/self/maps").read_text()
    assert len(list(model.parameters())) > 0


def test_load_into_fills_modules_of_any_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ternarize(mlp(), group_size=8, exclude=["4"]).eval()
    model.get_buffer("1.running_mean").add_(1)
    save_pretrained(model, tmp_path / "out")
    loaded = load_into(mlp().eval(), tmp_path / "out")
    assert_same_state(model, loaded, training=False)
    assert type(loaded.get_submodule("4")) is nn.Linear
    x = torch.randn(5, 9)
    assert torch.equal(model(x), loaded(x))


def test_layers_that_share_their_weights_are_written_once_and_stay_shared(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8, bias=False)
            self.second = nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

    model = ternarize(Twice())
    save_pretrained(model, tmp_path / "out")
    assert set(open_checkpoint(tmp_path / "out").tensors) == {"first.T_packed", "first.E"}
    loaded = load_into(Twice(), tmp_path / "out")
    assert isinstance(loaded.first, TernaryLinear)
    assert loaded.second is loaded.first
    assert torch.equal(loaded.first.T_packed, model.get_parameter("first.T_packed"))


def test_layers_of_different_configurations_keep_their_own(tmp_path: Path) -> None:
    model = ternarize(mlp(), TernaryConfig(group_size=4), include=["0"])
    ternarize(model, TernaryConfig(group_size=-1, planes=2), include=["3", "4"])
    save_pretrained(model, tmp_path / "out")
    loaded = load_into(mlp(), tmp_path / "out")
    assert_same_state(model, loaded, training=False)
    assert [layer.config for _, layer in ternary_layers(loaded)] == [layer.config for _, layer in ternary_layers(model)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_mantissas_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    layer = TernaryLinear(8, 2, bias=False, trainable=False, config=TernaryConfig(group_size=4))
    layer.E_mantissa = nn.Parameter(torch.arange(4, dtype=dtype).reshape(2, 2), requires_grad=False)
    model = nn.Sequential(layer)
    save_pretrained(model, tmp_path / "out")
    loaded = load_into(nn.Sequential(nn.Linear(8, 2, bias=False)), tmp_path / "out")
    assert_same_state(model, loaded, training=False)


def test_models_without_ternary_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="call ternarize"):
        save_pretrained(mlp(), tmp_path / "out")


def test_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    model = ternarize(mlp())
    save_pretrained(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="force"):
        save_pretrained(model, tmp_path / "out")
    save_pretrained(model, tmp_path / "out", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_load_into_another_module_names_the_layer(tmp_path: Path) -> None:
    save_pretrained(ternarize(mlp()), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"layer '0' is 6x9.*it is 5x9"):
        load_into(nn.Sequential(nn.Linear(9, 5)), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"layer '0' is ternary.*it is a ReLU"):
        load_into(nn.Sequential(nn.ReLU()), tmp_path / "out")


def test_tensor_that_the_model_needs_and_no_file_has_is_named(tmp_path: Path) -> None:
    save_pretrained(ternarize(nn.Sequential(nn.Linear(4, 4))), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"'1\.weight'"):
        load_into(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), tmp_path / "out")


def test_from_pretrained_of_a_plain_module_points_to_load_into(tmp_path: Path) -> None:
    save_pretrained(ternarize(mlp()), tmp_path / "out")
    with pytest.raises(CheckpointError, match="load_into"):
        from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("content", ["", "[]", "[" * 10**5])
def test_a_damaged_generation_config_is_named(content: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "packed")
    (tmp_path / "packed" / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        from_pretrained(tmp_path / "packed")
