"""Which tokens a step sees, and how they come to the disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ternarize.errors import ConfigError
from ternarize.train import data
from ternarize.train.data import open_tokens, token_dtype, validation_windows, windows, write_tokens
from ternarize.train.tokenizer import byte_tokenizer, read_tokenizer, vocabulary_size

TOKENS = np.arange(1000, dtype=np.uint16)


def test_windows_follow_from_seed_and_step_alone() -> None:
    first = windows(TOKENS, 8, 4, seed=1, step=5)
    assert torch.equal(first, windows(TOKENS, 8, 4, seed=1, step=5))
    assert not torch.equal(first, windows(TOKENS, 8, 4, seed=2, step=5))
    assert not torch.equal(first, windows(TOKENS, 8, 4, seed=1, step=6))


def test_a_step_sees_the_same_windows_however_it_is_cut_into_micro_batches() -> None:
    assert torch.equal(windows(TOKENS, 8, 12, seed=0, step=3)[:4], windows(TOKENS, 8, 4, seed=0, step=3))


def test_windows_are_runs_of_the_text_and_reach_both_of_its_ends() -> None:
    tokens = TOKENS[:12]
    drawn = torch.cat([windows(tokens, 8, 16, seed=0, step=step) for step in range(8)])
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn - drawn[:, :1], torch.arange(9).expand(len(drawn), 9))
    assert set(drawn[:, 0].tolist()) == {0, 1, 2, 3}


def test_validation_windows_are_whole_batches_at_even_distances() -> None:
    batches = validation_windows(TOKENS, 8, 24)
    assert [batch.shape for batch in batches] == [(24, 9)] * 3
    starts = torch.cat(batches)[:, 0]
    assert starts[0] == 0
    assert starts[-1] == len(TOKENS) - 9
    assert starts.diff().max() - starts.diff().min() <= 1


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"x" * 100)
    write_tokens(tmp_path, [tmp_path / "text"], None, None)
    open_tokens(tmp_path, None).check(4)
    with pytest.raises(ConfigError, match="validation text has 5 tokens, ctx=5 needs 6"):
        open_tokens(tmp_path, None).check(5)


@pytest.mark.parametrize("chunk", [3, data.CHUNK])
def test_bytes_of_several_texts_become_tokens_and_the_last_are_held_out(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CHUNK", chunk)
    parts = [bytes(range(256)), b"one\ntwo\n\xff" * 10]
    for i, part in enumerate(parts):
        (tmp_path / f"{i}.txt").write_bytes(part)
    write_tokens(tmp_path, [tmp_path / "0.txt", tmp_path / "1.txt"], None, None)
    tokens = open_tokens(tmp_path, None)
    assert bytes(tokens.train) + bytes(tokens.validation) == b"".join(parts)
    assert len(tokens.validation) == 18


def test_a_text_of_its_own_is_used_for_validation(tmp_path: Path) -> None:
    for name in ("train", "other"):
        (tmp_path / name).write_text(name)
    write_tokens(tmp_path, [tmp_path / "train"], tmp_path / "other", None)
    tokens = open_tokens(tmp_path, None)
    assert bytes(tokens.train) == b"train"
    assert bytes(tokens.validation) == b"other"


def test_tokens_of_a_tokenizer_file_are_those_of_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 5)
    lines = "".join(f"the word {i} and more\n" for i in range(40))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([lines], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text(lines)
    read = read_tokenizer(tmp_path / "tokenizer.json")
    assert token_dtype(read) == np.uint16
    write_tokens(tmp_path, [tmp_path / "text"], None, read)
    tokens = open_tokens(tmp_path, read)
    ids = np.concatenate([tokens.train, tokens.validation])
    assert ids.tolist() == tokenizer.encode(lines).ids
    assert len(ids) < len(lines)


def test_numbers_of_tokens_may_have_gaps(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: 300 * i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "text").write_text("some words\n" * 10)
    write_tokens(tmp_path, [tmp_path / "text"], None, tokenizer)
    assert open_tokens(tmp_path, tokenizer).train.max() < vocabulary_size(tokenizer) == 300 * 255 + 1


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="a tokenizer without tokens"):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_needs_utf8(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match="text is not UTF-8"):
        write_tokens(tmp_path, [tmp_path / "text"], None, byte_tokenizer())


def test_the_byte_tokenizer_gives_each_byte_its_own_value() -> None:
    text = "".join(map(chr, range(0x250))) + "€ \u4e2d\u6587 \U0001f600\n"
    ids = byte_tokenizer().encode(text).ids
    assert bytes(ids) == text.encode()
    assert byte_tokenizer().decode(ids) == text
    assert byte_tokenizer().get_vocab_size() == 256
