import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.triton.rounding import add_uniform, random_bits
from ternarize.errors import ShapeError
from ternarize.philox import philox, uniform

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


def words(values: tuple[int, ...]) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), (k0, k1))) == expected


def test_strips_draw_the_numbers_of_the_whole() -> None:
    rng = torch.tensor([2**32 - 1, 5, 9])
    whole = uniform(rng, 1, slice(0, 9), 7)
    strips = [uniform(rng, 1, rows, 7) for rows in (slice(0, 1), slice(1, 6), slice(6, 9))]
    assert torch.equal(torch.cat(strips), whole)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_seed_layer_and_step_each_change_the_numbers(changed: int) -> None:
    rng = torch.tensor([1, 2, 3])
    other = rng.clone()
    other[changed] += 1
    rows = slice(0, 8)
    assert (uniform(rng, 0, rows, 64) == uniform(other, 0, rows, 64)).float().mean() < 0.01


def test_a_tensor_names_the_same_stream_as_an_int() -> None:
    rng = torch.tensor([1, 2, 3])
    rows = slice(0, 4)
    assert torch.equal(uniform(rng, torch.tensor(3, dtype=torch.int32), rows, 8), uniform(rng, 3, rows, 8))
    assert not torch.equal(uniform(rng, 2, rows, 8), uniform(rng, 3, rows, 8))


def test_numbers_are_uniform_in_the_unit_interval() -> None:
    numbers = uniform(torch.tensor([3, 1, 4]), 0, slice(0, 100), 1000).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Five standard deviations of the mean and of the mean square of 10^5 uniform numbers.
    assert abs(numbers.mean() - 1 / 2) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs(numbers.square().mean() - 1 / 3) < 5 * (4 / 45 / 1e5) ** 0.5


def test_a_wrong_rng_tensor_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"need int64 \[3\]"):
        uniform(torch.zeros(2, dtype=torch.int64), 0, slice(0, 1), 4)


@triton.jit  # type: ignore[untyped-decorator]
def uniform_kernel(rng: tl.tensor, out: tl.tensor, stream: tl.tensor, K: tl.tensor, TOGETHER: tl.constexpr) -> None:
    n, k = tl.arange(0, 4), tl.arange(0, 16)
    place = n[:, None] * K + k[None, :]
    bits = random_bits(rng, stream, n, k, K, TOGETHER)
    numbers = add_uniform(tl.zeros_like(bits), bits)
    tl.store(out + place, numbers, mask=(k < K)[None, :] & (n < 4)[:, None])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("K", [11, 16])
def test_triton_draws_the_same_numbers(device: str, together: bool, K: int) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles here: it cannot run on the CPU")
    rng = torch.tensor([2**32 - 1, 2**31 + 1, 2**32 - 2], device=device)
    out = torch.empty(4, K, device=device)
    uniform_kernel[(1,)](rng, out, 5, K, together)
    assert torch.equal(out, uniform(rng, 5, slice(0, 4), K))
