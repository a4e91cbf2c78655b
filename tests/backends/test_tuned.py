"""The table of measured tiles: what is looked up, what is written, and what is ignored."""

import dataclasses
import json
import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tilelang", reason="TileLang is for Linux")

from ternarize.backends.tilelang import tuned
from ternarize.backends.tilelang.layers import LayerShape
from ternarize.backends.tilelang.linear import choose_tile, heuristic_tile
from ternarize.backends.tilelang.tuned import Key, bucket, save, table_file

GPU = "NVIDIA H200"

LAYERS = (LayerShape(N=4096, planes=1, mantissa=None, bias=False),)

#: Not what the heuristic has for 64 tokens.
OTHER = heuristic_tile(8192, LAYERS, 4096, 128, "bfloat16")

KEY = Key(layers=LAYERS, K=4096, g=128, dtype="bfloat16", activation="float", tokens=64)

#: Of an entry, all but layers and tile.
CALL = b'"K": 1, "g": 1, "dtype": "bfloat16", "activation": "float", "tokens": 1, "program": "wgmma"'


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache directory of its own, and nothing remembered of another."""
    monkeypatch.setenv("TERNARIZE_CACHE_DIR", str(tmp_path))
    yield tmp_path
    tuned.table.cache_clear()
    choose_tile.cache_clear()


def choose(M: int, gpu: str | None = GPU) -> tuned.AnyTile:
    choose_tile.cache_clear()
    tuned.table.cache_clear()
    return choose_tile(M, LAYERS, 4096, 128, "bfloat16", gpu)


def test_a_saved_tile_is_chosen_on_its_gpu_for_its_tokens_only(empty_cache: Path) -> None:
    file = save(GPU, {KEY: OTHER})
    assert file.parent == empty_cache
    assert heuristic_tile(64, LAYERS, 4096, 128, "bfloat16") != OTHER
    for M in (33, 64):
        assert choose(M) == OTHER
    for M in (32, 65):
        assert choose(M) == heuristic_tile(M, LAYERS, 4096, 128, "bfloat16")
    assert choose_tile(64, LAYERS, 4096, 128, "bfloat16", GPU, "int8") != OTHER
    assert choose(64, "NVIDIA H100 80GB HBM3") == choose(64, None) == heuristic_tile(64, LAYERS, 4096, 128, "bfloat16")


def test_decode_tiles_are_saved_too_and_saving_keeps_what_is_there() -> None:
    decode = heuristic_tile(1, LAYERS, 4096, 128, "bfloat16")
    save(GPU, {dataclasses.replace(KEY, tokens=1): decode})
    save(GPU, {KEY: OTHER})
    assert tuned.table(GPU) == {dataclasses.replace(KEY, tokens=1): decode, KEY: OTHER}


def test_another_version_of_the_kernels_has_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    save(GPU, {KEY: OTHER})
    monkeypatch.setattr(tuned, "kernels_version", lambda: "another")
    assert choose(64) == heuristic_tile(64, LAYERS, 4096, 128, "bfloat16")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"{",
        b"[" * 100_000,
        b'{"tiles": []}',
        b"[1]",
        b'[{"layers": [], "K": 1}]',
        b'[{"layers": [{"N": 1}], %b, "tile": {}}]' % CALL,
        b'[{"layers": [], %b, "tile": {"M": "64"}}]' % CALL,
    ],
)
def test_a_file_that_is_no_table_is_ignored_with_one_warning(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    table_file(GPU).parent.mkdir(exist_ok=True)
    table_file(GPU).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        choose(64)
        assert choose_tile(63, LAYERS, 4096, 128, "bfloat16", GPU) == heuristic_tile(63, LAYERS, 4096, 128, "bfloat16")
    assert len(caplog.records) == 1
    assert str(table_file(GPU)) in caplog.text
    save(GPU, {KEY: OTHER})
    assert choose(64) == OTHER


def test_a_file_that_cannot_be_read_is_ignored() -> None:
    table_file(GPU).mkdir()
    assert choose(64) == heuristic_tile(64, LAYERS, 4096, 128, "bfloat16")


def _save_one(tokens: int) -> None:
    save(GPU, {dataclasses.replace(KEY, tokens=tokens): OTHER})


def test_processes_that_save_at_the_same_time_lose_nothing() -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.map(_save_one, range(1, 33), chunksize=4)
    assert len(json.loads(table_file(GPU).read_text())) == 32
    leftovers = [file for file in table_file(GPU).parent.iterdir() if file.suffix not in (".json", ".lock")]
    assert leftovers == []


def test_the_shipped_table_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    assert all(key.tokens == bucket(key.tokens) for key in tuned.table(None))
    assert not caplog.records


def test_token_counts_are_looked_up_by_powers_of_two() -> None:
    assert [bucket(M) for M in (1, 2, 3, 16, 17, 8192, 8193, 10**6)] == [1, 2, 4, 16, 32, 8192, 8192, 8192]
