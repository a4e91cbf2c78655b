"""Only models whose logits do not depend on later tokens are trained, measured and generated from."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from ternarize import TernaryConfig, save_pretrained, ternarize
from ternarize.causal import positions, require_causal
from ternarize.cli import FAILURE, OK, main
from ternarize.errors import CheckpointError, KernelError
from tests.conftest import byte_tokenizer, tiny_llama

SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}

BERT = BertConfig(**SIZES, max_position_embeddings=64)
XLNET = XLNetConfig(vocab_size=257, d_model=64, n_layer=2, n_head=4, d_inner=64)


def built(config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.parametrize("config", [BERT, XLNET], ids=["bert", "xlnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    model = built(config)
    # As large as trained ones are.
    for parameter in model.parameters():
        parameter.data.mul_(5)
    with pytest.raises(CheckpointError, match=f"{type(model).__name__} is not causal, its logits depend on later"):
        require_causal(model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_are_not_refused(dtype: torch.dtype) -> None:
    require_causal(tiny_llama().to(dtype))
    require_causal(built(BertConfig(**SIZES, is_decoder=True)).to(dtype))


def test_rounding_is_no_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    forward = model.forward

    # As experts do that get another number of tokens.
    def rounded(**tokens: Any) -> Any:
        output = forward(**tokens)
        output.logits[1] *= 1 + 1e-6
        return output

    monkeypatch.setattr(model, "forward", rounded)
    require_causal(model)


@pytest.mark.parametrize("error", [KernelError("no kernel"), torch.OutOfMemoryError("no memory")])
def test_errors_that_are_no_fault_of_the_model_stay_what_they_are(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    monkeypatch.setattr(model, "forward", Mock(side_effect=error))
    with pytest.raises(type(error), match=r"^no "):
        require_causal(model)


def test_a_model_of_few_positions_is_tried_on_as_many() -> None:
    config = RobertaConfig(**SIZES, max_position_embeddings=6, is_decoder=True, pad_token_id=1)
    model = built(config)
    # The first two rows are for padding.
    assert positions(model) == 4
    require_causal(model)
    with pytest.raises(CheckpointError, match="is not causal"):
        require_causal(built(RobertaConfig(**SIZES, max_position_embeddings=6, pad_token_id=1)))


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(100)), encoding="utf-8")
    sizes = ["--ctx", "16", "--batch", "2", "--steps", "1", "--device", "cpu"]
    return ["train", "--text", str(text), "--out", str(tmp_path / "run"), "--model", str(tmp_path), *sizes]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BERT, "BertLMHeadModel is not causal, its logits depend on later tokens: give a decoder language model"),
        (T5Config(vocab_size=257), "transformers cannot build a 't5'"),
    ],
    ids=["bert", "t5"],
)
def test_an_encoder_is_not_trained(
    config: PreTrainedConfig, message: str, call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path)
    assert main(call) == FAILURE
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ternarize: error:")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_bert_that_is_a_decoder_is_trained(call: list[str], tmp_path: Path) -> None:
    BertConfig(**SIZES, is_decoder=True).save_pretrained(tmp_path)
    assert main(call) == OK


@pytest.mark.parametrize("verb", [["eval", "--max-tokens", "40"], ["generate", "--prompt", "x"]], ids=lambda v: v[0])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_an_encoder_is_neither_measured_nor_generated_from(
    packed: bool, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BERT)
    if packed:
        save_pretrained(ternarize(model, TernaryConfig(group_size=32), trainable=False), tmp_path / "model")
    else:
        model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert main([verb[0], str(tmp_path / "model"), *verb[1:], "--json"]) == FAILURE
    error = json.loads(capsys.readouterr().out)["error"]
    assert error.startswith(f"{tmp_path / 'model'}: Bert")
    assert "is not causal" in error
