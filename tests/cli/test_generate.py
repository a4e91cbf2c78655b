import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ternarize.cli import FAILURE, OK, USAGE, main
from ternarize.errors import ConfigError
from ternarize.evaluate import load
from ternarize.generate import generate


def test_greedy_generation_takes_the_most_likely_token_each_time(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    result = generate(model, tokenizer, "hello", max_new_tokens=5)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert result.text == tokenizer.decode(ids[0, 5:], skip_special_tokens=True).strip()
    assert result.tokens == 5
    assert result.tokens_per_second == pytest.approx(5 / result.seconds)


def test_sampling_is_repeatable_and_differs_between_seeds(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    first, again, other = (
        generate(model, tokenizer, "hello", max_new_tokens=16, temperature=1.0, seed=seed).text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_chat_template_is_used_if_there_is_one_and_wanted(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    plain = generate(model, tokenizer, "[hello]", max_new_tokens=8).text
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    assert generate(model, tokenizer, "hello", max_new_tokens=8).text == plain
    assert generate(model, tokenizer, "[hello]", max_new_tokens=8, chat=False).text == plain
    assert generate(model, tokenizer, "[hello]", max_new_tokens=8).text != plain


def test_generation_ends_where_the_positions_of_the_model_do(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint, device="cpu")
    config: Any = model.config
    config.max_position_embeddings = 8
    assert generate(model, tokenizer, "hello", max_new_tokens=16).tokens == 3
    with pytest.raises(ConfigError, match="the prompt has 8 tokens, the model 8 positions: shorten it"):
        generate(model, tokenizer, "hello!!!", max_new_tokens=16)


def test_the_verb_prints_the_text_and_the_speed(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["generate", str(tiny_checkpoint), "--prompt", "hello", "--max-new-tokens", "4"]
    assert main(call) == OK
    assert "4 tokens" in capsys.readouterr().out
    assert main([*call, "--json", "--no-chat"]) == OK
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "hello"
    assert result["tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x\udcff"], "the prompt is not UTF-8 text (surrogates not allowed at 1): convert it"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "x", "--seed", str(2**64)], f"seed is {2**64}"),
    ],
)
def test_a_wrong_call_of_generate_is_one_line(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", str(tiny_checkpoint), *arguments]) == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_generate_from_what_is_no_model_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == FAILURE
    assert "is no model" in capsys.readouterr().err
