"""Text from a prompt: greedy or sampled, with the chat template of instruction-tuned models."""

import dataclasses
import math
import time
from typing import Any

import torch
from torch import nn

from ternarize.causal import positions
from ternarize.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` produced."""

    text: str
    """The continuation, without the prompt and without special tokens."""
    tokens: int
    """New tokens, an end-of-text token included."""
    seconds: float
    """Wall time, the prompt's forward pass included."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens over wall time."""
        return self.tokens / self.seconds


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = True,
) -> Generation:
    """Continue a prompt with a transformers model.

    Args:
        model: a transformers causal language model, dense or ternary, compiled in place or not.
        tokenizer: its tokenizer.
        prompt: the user's message, or plain text.
        max_new_tokens: at most so many, and no more than the model has positions for.
        temperature: 0 is greedy; larger is sampling from the softmax of logits / temperature.
        seed: of the sampling, 64 bits.
        chat: put the prompt through the tokenizer's chat template, if it has one.

    Raises:
        ConfigError: for a prompt that is empty, is no UTF-8 text or fills the model's positions, a temperature that is
            negative or not finite, fewer than one new token, or a seed of more bits.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 text ({error.reason} at {error.start}): convert it") from None
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature is {temperature}: use 0 for greedy, or a positive number")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: use at least 1")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed is {seed}, no number of 64 bits: use 0 to {2**64 - 1}")
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    device = next(model.parameters()).device
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    room = positions(model) - ids.shape[1]
    if room < 1:
        raise ConfigError(f"the prompt has {ids.shape[1]} tokens, the model {positions(model)} positions: shorten it")
    # Overrides the sampling defaults that instruction-tuned checkpoints bring along: what is asked for is what runs.
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]  # a method that transformers adds to its models
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :]
    return Generation(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)
