"""Every format that can be read gives the same tensors, and none runs code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ternarize.checkpoint import open_checkpoint
from ternarize.checkpoint.source import Source
from ternarize.errors import CheckpointError


def assert_holds(source: Source, expected: dict[str, torch.Tensor]) -> None:
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        info = source.tensors[name]
        loaded = source.load(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype) == (tuple(loaded.shape), loaded.dtype)
        assert torch.equal(loaded, tensor)
        assert source.stored_bytes(name) == tensor.nbytes


TENSORS = {
    "a.weight": torch.randn(4, 6),
    "b.weight": torch.randn(3, 4).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "flags": torch.tensor([True, False]),
}


def test_safetensors_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert_holds(open_checkpoint(tmp_path / "x.safetensors"), TENSORS)


def test_sharded_safetensors_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_holds(open_checkpoint(tmp_path), load_file(tiny_checkpoint / "model.safetensors"))


def test_missing_shard_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path, max_shard_size="50KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_torch_file_also_inside_a_training_checkpoint(key: str | None, tmp_path: Path) -> None:
    torch.save(TENSORS if key is None else {key: TENSORS, "epoch": 3}, tmp_path / "x.pt")
    assert_holds(open_checkpoint(tmp_path / "x.pt"), TENSORS)


def test_pytorch_model_bin_of_a_folder(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert_holds(open_checkpoint(tmp_path), TENSORS)


def test_folder_of_several_weights_without_an_index_asks_for_one(tmp_path: Path) -> None:
    for name in ("x.pt", "y.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"2 files.*x\.pt"):
        open_checkpoint(tmp_path)


def test_packed_file_without_its_folder_is_refused(packed_source: Path) -> None:
    with pytest.raises(CheckpointError, match="give the folder"):
        open_checkpoint(packed_source / "model.safetensors")


def test_gguf_of_a_llama_has_transformers_names_rows_and_config(tiny_checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = LlamaForCausalLM.from_pretrained(tiny_checkpoint)
    config = model.config
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        # llama.cpp interleaves the two halves of each head of q and k.
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        name_in_gguf = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 2 and "down_proj" in name:
            values = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name_in_gguf, values, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name_in_gguf, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    source = open_checkpoint(tmp_path / "tiny.gguf")
    assert source.config is not None
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert source.config["num_key_value_heads"] == config.num_key_value_heads
    assert source.tensors.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        if "down_proj" in name:
            assert source.stored_bytes(name) == tensor.numel() // 32 * 34
            assert torch.allclose(source.load(name), tensor, atol=float(tensor.abs().max()) / 127)
        else:
            assert torch.equal(source.load(name), tensor), name
