"""What a causal language model is: how long its sequences may be, and whether a model is one, tried out."""

import sys
from typing import Any

import torch
from torch import nn

from ternarize.errors import CheckpointError, TernarizeError, out_of_memory

#: Tokens that a model is tried on, if it has as many positions.
TRIED = 8


def positions(model: nn.Module) -> int:
    """How many tokens a sequence of a language model may have: what its config says, or any number."""
    limit: int | None = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    # Some configs say -1 where there is no limit.
    if limit is None or limit <= 0:
        return sys.maxsize
    # RoBERTa and its kin count positions from the row after that of padding.
    unused = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return limit - max(unused, default=0)


def require_causal(model: nn.Module) -> None:
    """Refuse a model whose logits depend on later tokens, as an encoder's do: its next-token loss means nothing.

    Tried out, because nothing tells it of all of transformers' models: AutoModelForCausalLM makes encoders too (BERT
    without ``is_decoder``, XLNet), a packed folder may name any class, and recurrent models have no mask. Two windows
    that differ in their last token go through the model in one batch, so that both are computed alike.

    Args:
        model: of transformers, in eval mode.

    Raises:
        CheckpointError: if it is not causal, or gives no logits for tokens alone.
    """
    name = type(model).__name__
    count = min(TRIED, positions(model))
    config: Any = model.config
    try:
        # From all over the vocabulary: its first tokens are often unused, and alike.
        tokens = torch.arange(count) * config.get_text_config(decoder=True).vocab_size // count
        batch = torch.stack([tokens, tokens]).to(next(model.parameters()).device)
        batch[1, -1] = 0
        with torch.no_grad():
            logits = model(input_ids=batch, use_cache=False).logits.float()
    # Models of a hundred architectures raise whatever comes to them.
    except Exception as error:
        if isinstance(error, TernarizeError) or out_of_memory(error):
            raise
        raise CheckpointError(
            f"{name} gives no logits for tokens alone ({error}): mend its config, or give a decoder language model"
        ) from error
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # Experts multiply as many tokens at a time as come to them, which rounds differently: by 1e-6 in float32, where an
    # encoder's first weights let through 3e-3.
    rounding = torch.finfo(dtype).eps ** 0.5 / 2 * logits.abs().max()
    if ((logits[0, :-1] - logits[1, :-1]).abs() > rounding).any():
        raise CheckpointError(
            f"{name} is not causal, its logits depend on later tokens: give a decoder language model, such as a Llama, "
            'or a BERT whose config has "is_decoder": true'
        )
