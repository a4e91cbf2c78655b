"""Tokenizers that are stored with a trained model, so that it is served with what it was trained with."""

from pathlib import Path
from typing import Any

from ternarize.errors import ConfigError


def read_tokenizer(file: Path) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json.

    Raises:
        ConfigError: if it is none.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    # The library raises plain Exceptions.
    except Exception as error:
        raise ConfigError(f"{file} is no tokenizer file ({error}): give a tokenizer.json") from None
    if not tokenizer.get_vocab():
        raise ConfigError(f"{file} is a tokenizer without tokens: give one that was trained")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """How many rows an embedding needs: the numbers of a tokenizer's tokens may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` whose tokens are the 256 bytes, each under its own value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The byte-level alphabet of GPT-2 writes printable bytes as themselves and the others, in order, from 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: ord(letter) for letter in alphabet if ord(letter) < 256}
    others = [byte for byte in range(256) if chr(byte) not in vocabulary]
    vocabulary |= dict(zip(alphabet[len(vocabulary) :], others, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer into a model's folder, as transformers reads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
