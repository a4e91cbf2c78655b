import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from ternarize import evaluate
from ternarize.errors import CheckpointError, ConfigError, NonFiniteError
from ternarize.evaluate import load, perplexity, sample_text

GGUF = Path(__file__).parents[1] / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_perplexity_is_that_of_windows_scored_one_by_one(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    text = sample_text()[:150]
    result = perplexity(model, tokenizer, text, window=64)

    ids = tokenizer(text).input_ids
    losses = []
    for window in (ids[:64], ids[64:128], ids[128:]):
        log_probabilities = model(torch.tensor([window])).logits[0].log_softmax(-1)
        losses += [-log_probabilities[i - 1, token].item() for i, token in enumerate(window) if i > 0]
    assert result.tokens == len(losses) == 150 - 3
    assert result.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


def test_max_tokens_takes_the_start_of_the_text(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    start = perplexity(model, tokenizer, sample_text()[:100], window=32)
    assert perplexity(model, tokenizer, sample_text(), window=32, max_tokens=100).nll == start.nll


def test_a_last_window_of_one_token_is_not_scored(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    assert perplexity(model, tokenizer, "x" * 65, window=64).tokens == 63


def test_a_window_has_no_more_tokens_than_the_model_has_positions(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    config: Any = model.config
    for positions, window in ((48, 48), (4096, 512), (-1, 512)):
        config.max_position_embeddings = positions
        assert perplexity(model, tokenizer, sample_text(), max_tokens=600).window == window
    config.max_position_embeddings = 48
    with pytest.raises(ConfigError, match="window is 49, the model has 48 positions: use at most as many"):
        perplexity(model, tokenizer, sample_text(), window=49)


@pytest.mark.parametrize(
    ("text", "window", "message"), [("a", 64, "1 tokens"), ("", 64, "0 tokens"), ("abc", 1, "window is 1")]
)
def test_too_little_to_score_is_an_error(tiny_checkpoint: Path, text: str, window: int, message: str) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    with pytest.raises(ConfigError, match=message):
        perplexity(model, tokenizer, text, window=window)


def test_a_broken_model_is_an_error_and_a_bad_one_is_not(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.weight.data.mul_(1e6)
    assert perplexity(model, tokenizer, "hello").perplexity == math.inf
    head.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="log-likelihood is nan"):
        perplexity(model, tokenizer, "hello")


def test_load_gives_a_dense_model_in_the_asked_dtype(tiny_checkpoint: Path) -> None:
    model, _ = load(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_what_is_no_model_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: give a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no model: give a folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(tmp_path)


def test_a_damaged_gguf_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        load(tmp_path / "model.gguf")


def test_missing_transformers_is_an_error_that_says_how_to_install_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ternarize\[transformers\]'"):
        load(tiny_checkpoint)


def test_the_sample_text_is_long_enough_for_2000_tokens() -> None:
    assert len(sample_text().split()) > 2000
    assert sample_text().isascii()


def test_the_device_is_a_gpu_where_there_is_one() -> None:
    assert (evaluate.default_device().type == "cuda") == torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.skipif(not GGUF.exists(), reason="needs the GGUF file that make demo fetches")
def test_a_gguf_model_predicts_english() -> None:
    model, tokenizer = load(GGUF)
    assert isinstance(model, nn.Module)
    assert perplexity(model, tokenizer, sample_text(), max_tokens=512).perplexity < 50


def test_too_little_memory_is_no_fault_of_the_checkpoint(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory = Mock(side_effect=MemoryError)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_memory)
    with pytest.raises(MemoryError):
        load(tiny_checkpoint, device="cpu")
