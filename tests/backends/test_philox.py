from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.triton.rounding import commit_words, commit_words_apart, gradient_bits_apart, load_key
from ternarize.backends.triton.rounding import gradient_bits as gradient_bits_together
from ternarize.errors import ShapeError
from ternarize.philox import commit_bits, gradient_bits, philox, round_off, to_fixed

ONES = 0xFFFFFFFF

#: Counter, key and output of philox4x32 with 10 rounds, from kat_vectors of Random123.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def words(*values: int) -> Any:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == expected


def test_strips_draw_the_bits_of_the_whole() -> None:
    rng = torch.tensor([2**32 - 1, 5, 9])
    strips = (slice(0, 1), slice(1, 6), slice(6, 9))
    whole = gradient_bits(rng, 1, slice(0, 9), 7)
    assert torch.equal(torch.cat([gradient_bits(rng, 1, rows, 7) for rows in strips]), whole)
    for i, of_whole in enumerate(commit_bits(rng, slice(0, 9), 7)):
        assert torch.equal(torch.cat([commit_bits(rng, rows, 7)[i] for rows in strips]), of_whole)


def all_bits(rng: Tensor, rows: slice, K: int) -> Tensor:
    """What a commit and two micro-batches draw for each element, [4, rows, K]."""
    return torch.stack([*commit_bits(rng, rows, K), *(gradient_bits(rng, i, rows, K) for i in range(2))])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_seed_layer_and_step_each_change_the_bits(changed: int) -> None:
    rng = torch.tensor([1, 2, 3])
    other = rng.clone()
    other[changed] += 1
    rows = slice(0, 8)
    assert (all_bits(rng, rows, 64) == all_bits(other, rows, 64)).float().mean() < 0.01


def test_a_tensor_names_the_same_micro_batch_as_an_int() -> None:
    rng = torch.tensor([1, 2, 3])
    rows = slice(0, 4)
    assert torch.equal(gradient_bits(rng, torch.tensor(3, dtype=torch.int32), rows, 8), gradient_bits(rng, 3, rows, 8))
    assert not torch.equal(gradient_bits(rng, 2, rows, 8), gradient_bits(rng, 3, rows, 8))


def test_no_bits_are_used_twice() -> None:
    # 16 bits alone repeat, pairs of neighbours do not.
    bits = all_bits(torch.tensor([3, 1, 4]), slice(0, 16), 64).flatten().to(torch.int64)
    assert bits.min() >= 0
    assert bits.max() < 2**16
    pairs = bits[:-1] * 2**16 + bits[1:]
    assert pairs.unique().numel() == pairs.numel()


@pytest.mark.parametrize("which", range(4))
def test_bits_are_uniform(which: int) -> None:
    numbers = all_bits(torch.tensor([3, 1, 4]), slice(0, 100), 1000)[which].double() / 2**16
    # Five standard deviations of the mean and of the mean square of 10^5 uniform numbers.
    assert abs(numbers.mean() - 1 / 2) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs(numbers.square().mean() - 1 / 3) < 5 * (4 / 45 / 1e5) ** 0.5


def test_bits_lie_where_the_documentation_says() -> None:
    seed, layer, step, n, k, K = 11, 7, 5, 3, 45, 70
    rng, key = torch.tensor([seed, layer, step]), words(seed, layer)
    block = philox(words(n * 18 + k // 4, 0, step, 0), key)
    word = int(block[k % 4])
    low, high = commit_bits(rng, slice(n, n + 1), K)
    assert (int(low[0, k]), int(high[0, k])) == (word & 0xFFFF, word >> 16)
    # Column 13 of the second run of 32: block 2 of its four, word 1, the upper half.
    block = philox(words(n * 12 + 4 + 2, 0, step, 1 + 9), key)
    assert int(gradient_bits(rng, 9, slice(n, n + 1), K)[0, k]) == int(block[1]) >> 16


def test_rounding_off_is_unbiased_on_its_grid() -> None:
    # Every outcome of the bits: 3/8 of them round 2.625 up and -2.625 down.
    bits = torch.arange(2**16, dtype=torch.int32)
    for value, up, down in ((2.625, 3, 2), (-2.625, -2, -3)):
        rounded = round_off(to_fixed(torch.tensor(value)), bits)
        assert set(rounded.tolist()) == {up, down}
        assert rounded.double().mean() == value
    # Between points of the grid: to the nearest, ties to even.
    assert to_fixed(torch.tensor([1.5, 2.5, 2.6]) / 2**16).tolist() == [2, 2, 3]


def test_a_wrong_rng_tensor_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"need int64 \[3\]"):
        commit_bits(torch.zeros(2, dtype=torch.int64), slice(0, 1), 4)


@triton.jit  # type: ignore[untyped-decorator]
def bits_kernel(rng: tl.tensor, out: tl.tensor, K: tl.tensor, TOGETHER: tl.constexpr) -> None:
    n, k = tl.arange(0, 4), tl.arange(0, 64)
    inside = (k < K)[None, :] & (n < 4)[:, None]
    place = out + n[:, None] * K + k[None, :]
    key, micro_batch = load_key(rng), tl.full((), 4, tl.int32)
    if TOGETHER:
        block = (n.to(tl.int64) * (K // 4))[:, None] + tl.arange(0, 16)[None, :]
        drawn = tl.reshape(commit_words(key, tl.reshape(block, (64,))), (4, 64))
        G = tl.zeros((4, 64), tl.float32)
        bits = gradient_bits_together(key, micro_batch, n, tl.arange(0, 2), tl.cdiv(K, 32), G)
    else:
        drawn = commit_words_apart(key, (n.to(tl.int64) * tl.cdiv(K, 4))[:, None] + (k // 4)[None, :], k[None, :] % 4)
        bits = gradient_bits_apart(key, micro_batch, n, k, K)
    tl.store(place, (drawn & 0xFFFF).to(tl.int32), mask=inside)
    tl.store(place + 4 * K, (drawn >> 16).to(tl.int32), mask=inside)
    tl.store(place + 8 * K, bits, mask=inside)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("together", "K"), [(True, 64), (False, 64), (False, 43)])
def test_triton_draws_the_same_bits(device: str, together: bool, K: int) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles here: it cannot run on the CPU")
    rng = torch.tensor([2**32 - 1, 2**31 + 1, 2**32 - 2], device=device)
    out = torch.empty(3, 4, K, device=device, dtype=torch.int32)
    bits_kernel[(1,)](rng, out, K, together)
    expected = torch.stack([*commit_bits(rng, slice(0, 4), K), gradient_bits(rng, 4, slice(0, 4), K)])
    assert torch.equal(out, expected)
