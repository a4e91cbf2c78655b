"""Makes checkpoints as transformers packs them by its quant_method "bitnet"."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.integrations.bitnet import pack_weights

from ternarize.checkpoint.source import read_json
from ternarize.checkpoint.write import write_json


def pack_as_bitnet(source: Path, folder: Path, **quantization: Any) -> dict[str, Tensor]:
    """Pack the blocks of a dense folder as transformers does; returns the float weights that these stand for."""
    divides = quantization.get("linear_class") != "autobitlinear"
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        mean = tensors[name].float().abs().mean()
        T = (tensors[name].float() / mean).round().clamp(-1, 1)
        scale = (1 / mean if divides else mean).reshape(1).bfloat16()
        weights[name] = T * (scale.float().reciprocal() if divides else scale.float())
        tensors |= {name: pack_weights(T.clone()), f"{name}_scale": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"], **quantization}
    write_json(folder / "config.json", config)
    return weights
