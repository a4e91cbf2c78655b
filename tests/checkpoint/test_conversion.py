"""Conversion: what becomes ternary, what stays, and what it costs in memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from ternarize import dequantize, ternarize
from ternarize.checkpoint import convert, from_pretrained, open_checkpoint
from ternarize.checkpoint.source import read_json
from ternarize.checkpoint.write import write_json
from ternarize.config import TernaryConfig
from ternarize.errors import CheckpointError, ConfigError, ConversionError
from ternarize.layer import TernaryLinear
from ternarize.quantize import quantize_bias, quantize_weight

CONFIG = TernaryConfig(planes=3, group_size=32)


def dense_weight(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name]


def test_packed_layers_hold_what_quantize_gives(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "out", CONFIG)
    model = from_pretrained(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, TernaryLinear)
    quantized = quantize_weight(dense_weight(tiny_checkpoint, f"{name}.weight"), CONFIG)
    expected = TernaryLinear.from_levels(quantized.levels, quantized.E, config=CONFIG)
    assert torch.equal(layer.T_packed, expected.T_packed)
    assert torch.equal(layer.E, expected.E)


@pytest.mark.parametrize("options", [{}, {"accumulator": "int4"}, {"rule": "sign"}], ids=["int8", "int4", "sign"])
def test_trainable_conversion_starts_training_where_ternarize_does(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = TernaryConfig(group_size=32, **options)
    convert(tiny_checkpoint, tmp_path / "out", config, trainable=True)
    converted = from_pretrained(tmp_path / "out", trainable=True)
    expected = ternarize(LlamaForCausalLM.from_pretrained(tiny_checkpoint), config)
    left, right = converted.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    name = "model.layers.0.mlp.up_proj.T_accum"
    assert left[name].any() == (config.rule == "factored")


def test_trainable_conversion_needs_one_plane_and_dense_weights(
    tiny_checkpoint: Path, packed_source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="one trit plane, not 3"):
        convert(tiny_checkpoint, tmp_path / "out", CONFIG, trainable=True)
    with pytest.raises(ConfigError, match="is ternary already"):
        convert(packed_source, tmp_path / "out", TernaryConfig(), trainable=True)
    assert not (tmp_path / "out").exists()


def test_linear_layers_are_told_from_embeddings_by_the_model_class(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = convert(tiny_checkpoint, tmp_path / "out", CONFIG)
    assert "LlamaForCausalLM" in report.identified_by
    assert len(report.converted) == 14
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert reasons["model.embed_tokens"] == "Embedding, not a linear layer"
    assert "kept dense by default" in str(reasons["lm_head"])
    assert report.mean_weight_error is not None
    assert 0 < report.mean_weight_error < 0.01
    assert report.bits_per_weight == pytest.approx(6 + 8 / 32)


def test_dense_tensors_and_the_tokenizer_come_along_unchanged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "out", CONFIG)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(written[name], dense_weight(tiny_checkpoint, name))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


def test_dtype_casts_only_what_stays_dense(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "out", CONFIG, dtype=torch.bfloat16)
    source = open_checkpoint(tmp_path / "out")
    assert source.tensors["model.norm.weight"].dtype == torch.bfloat16
    assert source.tensors["model.layers.0.mlp.up_proj.T_packed"].dtype == torch.uint8
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_include_opts_the_head_in_and_exclude_keeps_layers_dense(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = convert(tiny_checkpoint, tmp_path / "out", CONFIG, include=["lm_head", "mlp"], exclude=["down_proj"])
    names = {layer.name.rpartition(".")[2] for layer in report.converted}
    assert names == {"lm_head", "gate_proj", "up_proj"}


def test_bare_weights_are_judged_by_name_and_shape(tmp_path: Path) -> None:
    tensors = {
        "embed.weight": torch.randn(16, 8),
        "up.weight": torch.randn(12, 7),
        "up.bias": torch.randn(12),
        "norm.weight": torch.randn(8),
        "table.weight": torch.ones(4, 4, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "bare.safetensors")
    report = convert(tmp_path / "bare.safetensors", tmp_path / "out", CONFIG)
    assert "no config.json" in report.identified_by
    assert [layer.name for layer in report.converted] == ["up"]
    assert {layer.name: layer.reason for layer in report.kept}["table"] == "its dtype is int64"
    bias, exponent = quantize_bias(tensors["up.bias"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["up.bias"], bias)
    assert torch.equal(written["up.bias_exponent"], exponent)
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules"] == {"up": {"in_features": 7}}


def test_transposed_weights_of_conv1d_and_names_without_the_base_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    dense.transformer.save_pretrained(tmp_path / "dense")
    config = read_json(tmp_path / "dense" / "config.json")
    write_json(tmp_path / "dense" / "config.json", {**config, "architectures": ["GPT2LMHeadModel"]})
    report = convert(tmp_path / "dense", tmp_path / "out", TernaryConfig(planes=3, group_size=8))
    shapes = {layer.name: layer.shape for layer in report.converted}
    assert shapes["transformer.h.0.mlp.c_fc"] == (64, 16)
    model = from_pretrained(tmp_path / "out")
    x = torch.arange(8)[None]
    with torch.no_grad():
        difference = (model(x).logits - dense(x).logits).abs().max() / dense(x).logits.abs().max()
    assert difference < 0.1


def test_tied_head_stays_tied(tmp_path: Path, tiny_checkpoint: Path) -> None:
    dense = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    dense.config.tie_word_embeddings = True
    dense.tie_weights()
    dense.save_pretrained(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "out", CONFIG, include=["lm_head", "mlp"])
    assert all(layer.name != "lm_head" for layer in report.converted)
    model = from_pretrained(tmp_path / "out")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_packed_source_is_resharded_bit_for_bit(packed_source: Path, tmp_path: Path) -> None:
    report = convert(packed_source, tmp_path / "out", max_shard_size=30_000)
    assert report.planes is None
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    old, new = open_checkpoint(packed_source), open_checkpoint(tmp_path / "out")
    assert old.tensors == new.tensors
    assert all(torch.equal(old.load(name), new.load(name)) for name in old.tensors)


def test_progress_ends_at_the_size_of_the_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = convert(
        tiny_checkpoint, tmp_path / "out", CONFIG, progress=lambda name, done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes_before, report.bytes_before)


def test_nothing_to_convert_is_an_error_that_says_why(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not in include"):
        convert(tiny_checkpoint, tmp_path / "out", CONFIG, include=["nothing_of_this_name"])
    assert not (tmp_path / "out").exists()


def test_other_quantisers_checkpoints_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "gptq")
    config = read_json(tmp_path / "gptq" / "config.json")
    write_json(tmp_path / "gptq" / "config.json", {**config, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ConversionError, match="'gptq'"):
        convert(tmp_path / "gptq", tmp_path / "out", CONFIG)


def test_source_inside_destination_is_never_replaced(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"up.weight": torch.randn(4, 4)}, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(tmp_path / "bare.safetensors", tmp_path, CONFIG, force=True)
    assert (tmp_path / "bare.safetensors").exists()


def test_nan_in_a_weight_names_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_file({"up.weight": torch.full((4, 4), torch.nan)}, tmp_path / "bare.safetensors")
    with pytest.raises(ConversionError, match=r"up\.weight"):
        convert(tmp_path / "bare.safetensors", tmp_path / "out", CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["bare.safetensors"]


def test_dtypes_that_are_no_dense_ones_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        convert(tiny_checkpoint, tmp_path / "out", CONFIG, dtype=torch.int8)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from ternarize.checkpoint import convert
from ternarize.config import TernaryConfig
source, small, out = map(Path, sys.argv[1:])
# Lazily loaded code is not what is measured.
convert(small, out / "small", TernaryConfig(planes=3))
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = peak()
convert(source, out / "large", TernaryConfig(planes=3))
print(peak() - start)
"""


def test_peak_memory_stays_under_three_times_the_largest_tensor(tmp_path: Path) -> None:
    rows, columns = 2048, 4096
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "dense"
    folder.mkdir()
    weight_map = {}
    for i in range(6):
        weight = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
        save_file({f"layers.{i}.weight": weight}, folder / f"{i}.safetensors")
        weight_map[f"layers.{i}.weight"] = f"{i}.safetensors"
    save_file({"embed.weight": torch.zeros(rows, columns)}, folder / "embed.safetensors")
    weight_map["embed.weight"] = "embed.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    save_file({"up.weight": torch.ones(64, 64)}, tmp_path / "small.safetensors")
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "small.safetensors"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    largest = rows * columns * 4
    assert int(result.stdout) < 3 * largest, f"{int(result.stdout) / largest:.2f} times the largest tensor"


def make_ternary(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The tiny model with trits times a scale of each row in place of its blocks' matrices."""
    model = LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            scale = parameter.detach().abs().float().mean(1, keepdim=True).to(dtype)
            with torch.no_grad():
                parameter.copy_((parameter / scale).round().clamp(-1, 1) * scale)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float32, 24)], ids=str)
def test_weights_that_are_ternary_stay_what_they_are(
    dtype: torch.dtype, bits: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = make_ternary(tiny_checkpoint, tmp_path / "dense", dtype)
    report = convert(source, tmp_path / "out", TernaryConfig(init="exact", group_size=32))
    assert report.mean_weight_error == 0
    assert not report.rounded_ternary
    assert convert(source, tmp_path / "rounded", CONFIG).rounded_ternary
    assert not convert(tiny_checkpoint, tmp_path / "other", CONFIG).rounded_ternary
    assert len(report.converted) == 14
    quantization = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert (quantization["init"], quantization["scale_mantissa_bits"]) == ("exact", bits)
    expected = LlamaForCausalLM.from_pretrained(source).state_dict()
    made = dequantize(from_pretrained(tmp_path / "out"), dtype).state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
    # Packed again, it keeps its mantissas.
    convert(tmp_path / "out", tmp_path / "again")
    again = dequantize(from_pretrained(tmp_path / "again"), dtype).state_dict()
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_ternary_weights_of_conv1d_are_noticed_by_their_columns(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=32))
    for name, parameter in model.named_parameters():
        if "h.0" in name and parameter.dim() == 2:
            with torch.no_grad():
                parameter.copy_(parameter.sign() * torch.rand(parameter.shape[1]))
    model.save_pretrained(tmp_path / "dense")
    assert convert(tmp_path / "dense", tmp_path / "out", CONFIG).rounded_ternary


def test_float64_has_no_mantissas(tmp_path: Path) -> None:
    save_file({"up.weight": torch.ones(8, 32).double(), "down.weight": torch.ones(8, 32)}, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "out", TernaryConfig(init="exact"))
    assert [(layer.name, layer.reason) for layer in report.kept] == [("up", "its dtype is float64")]


def test_exact_conversion_of_other_weights_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"model\.layers\.0\..* is not ternary: a group of 32 weights"):
        convert(tiny_checkpoint, tmp_path / "out", TernaryConfig(init="exact", group_size=32))
    assert not (tmp_path / "out").exists()


def test_ternary_blocks_of_gguf_stay_what_they_are(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randint(-1, 2, (8, 512)) * torch.tensor([[0.0213], [0.5], [3.1], [1e-3]]).half().float().repeat(2, 1)
    blocks = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.TQ2_0)
    back = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.TQ2_0))
    quantized = quantize_weight(back, TernaryConfig(init="exact"))
    layer = TernaryLinear.from_levels(
        quantized.levels, quantized.E, config=TernaryConfig(), E_mantissa=quantized.E_mantissa
    )
    assert torch.equal(dequantize(layer).get_parameter("weight"), back)
    assert torch.equal(back, weight)
