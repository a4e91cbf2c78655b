"""A real GGUF file reads as transformers reads it."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ternarize.checkpoint import open_checkpoint

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def smollm2() -> Path:
    folders = [Path(os.environ.get("TERNARIZE_MODELS", ".models")), Path(__file__).parents[2] / ".models"]
    for folder in folders:
        if (folder / NAME).is_file():
            return folder / NAME
    pytest.skip(f"{NAME} is neither in $TERNARIZE_MODELS nor in .models/")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_equal_those_that_transformers_loads(smollm2: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=NAME, dtype=torch.float32).state_dict()
    source = open_checkpoint(smollm2)
    assert source.tensors.keys() == expected.keys() - {"lm_head.weight"}
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.29.self_attn.v_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
    ):
        assert torch.equal(source.load(name), expected[name]), name
