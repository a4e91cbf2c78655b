"""The commit that steps two weights at a time, and the instructions that it is made of."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.backends.triton import update
from ternarize.backends.triton.lanes import add_byte, add_lane, byte_over_lane, clamp_lanes, upper_lanes
from ternarize.backends.triton.update_lanes import takes
from ternarize.packing import pack
from tests.backends.kit import DEVICES, skip_unless_triton_runs

#: T_packed, T_accum, T_momentum and the stage.
Planes = tuple[Tensor, Tensor, Tensor, Tensor]

#: What an int8 may be of at the ends and in the middle.
ENDS = (-128, -127, -126, -1, 0, 1, 126, 127)


@triton.jit  # type: ignore[untyped-decorator]
def lanes_kernel(a: tl.tensor, b: tl.tensor, c: tl.tensor, out: tl.tensor) -> None:
    at = tl.arange(0, 256)
    first, second, third = tl.load(a + at), tl.load(b + at), tl.load(c + at)
    for i in tl.static_range(4):
        tl.store(out + i * 256 + at, add_byte(first, 65535 - i, second, i))
        tl.store(out + (4 + i) * 256 + at, byte_over_lane(first, i, second))
    for i in tl.static_range(2):
        tl.store(out + (8 + i) * 256 + at, add_lane(first, second, i))
    tl.store(out + 10 * 256 + at, upper_lanes(first, second))
    tl.store(out + 11 * 256 + at, clamp_lanes(first & 0x3FFF3FFF, second & 0x3FFF3FFF, third))
    tl.store(out + 12 * 256 + at, clamp_lanes(first | -0x3FFF4000, second | -0x3FFF4000, 0x00FE00FE))


def signed(values: Tensor, bits: int) -> Tensor:
    """The lowest bits as a signed number."""
    half = 1 << (bits - 1)
    return (values + half) % (2 * half) - half


def lanes_of(word: Tensor) -> Tensor:
    return torch.stack([signed(word, 16), signed(word >> 16, 16)])


def word_of(lanes: Tensor) -> Tensor:
    return signed(lanes[0] % 2**16 + (lanes[1] << 16), 32)


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_and_lanes_are_what_their_names_say(device: str) -> None:
    skip_unless_triton_runs(device)
    torch.manual_seed(0)
    a, b, c = torch.randint(-(2**31), 2**31, (3, 256))
    out = torch.empty(13, 256, dtype=torch.int32, device=device)
    lanes_kernel[(1,)](*(word.to(torch.int32).to(device) for word in (a, b, c)), out)
    expected = [signed(a + (65535 - i) * signed(b >> (8 * i), 8), 32) for i in range(4)]
    expected += [(signed(a >> (8 * i), 8) << 16) + (b >> 16) % 2**16 for i in range(4)]
    expected += [signed(a + (b >> (16 * i)) % 2**16, 32) for i in range(2)]
    expected.append(word_of(torch.stack([a >> 16, b >> 16])))
    sums = lanes_of(a & 0x3FFF3FFF) + lanes_of(b & 0x3FFF3FFF)
    expected.append(word_of(sums.minimum(lanes_of(c)).clamp_min(0)))
    assert not torch.zeros_like(a).equal(expected[-1])
    expected.append(torch.zeros_like(a))
    for i, (got, wanted) in enumerate(zip(out.cpu(), expected, strict=True)):
        assert torch.equal(got.long(), wanted), i


def commit(module: Any, planes: Planes, lr: float, count: int, group_size: int) -> tuple[Tensor, ...]:
    """T_packed, T_accum and T_momentum after a commit."""
    T_packed, T_accum, T_momentum, stage = (plane.clone() for plane in planes)
    device = stage.device
    module.update_commit(
        T_packed,
        torch.zeros(1, 1, dtype=torch.int8, device=device),
        T_accum,
        T_momentum,
        None,
        None,
        None,
        torch.tensor([2**32 - 5, 7, 2**31], device=device),
        stage,
        None,
        None,
        None,
        torch.tensor([0, count], dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.tensor([lr], device=device),
        100,
        2,
        group_size,
        "factored",
    )
    return T_packed, T_accum, T_momentum


def random_planes(N: int, K: int, group_size: int, device: str) -> Planes:
    """Half of the integers lie at the ends of int8."""
    torch.manual_seed(N * K)
    anywhere = torch.randint(-128, 128, (3, N, K), dtype=torch.int8)
    at_ends = torch.tensor(ENDS, dtype=torch.int8)[torch.randint(0, len(ENDS), (3, N, K))]
    accum, momentum, stage = torch.where(torch.rand(3, N, K) < 0.5, anywhere, at_ends).to(device)
    T = torch.randint(-1, 2, (N, K), dtype=torch.int8)
    return pack(T, group_size).to(device), accum, momentum, stage


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("N", "K", "group_size"), [(16, 256, 128), (3, 48, 16), (3, 320, -1)])
@pytest.mark.parametrize("lr", [0.0, 1e-3, 0.3, 1.5, 20.0, 64.6, 1e30])
def test_a_step_of_any_size_is_that_of_the_reference(device: str, N: int, K: int, group_size: int, lr: float) -> None:
    skip_unless_triton_runs(device)
    planes = random_planes(N, K, group_size, device)
    assert takes(*planes, update.quarter_of(K, group_size))
    for count in (1, 3, 127):
        expected = commit(reference, planes, lr, count, group_size)
        for got, wanted in zip(commit(update, planes, lr, count, group_size), expected, strict=True):
            assert torch.equal(got, wanted)


def test_what_is_no_whole_word_is_left_to_bytes() -> None:
    planes = random_planes(4, 64, 16, "cpu")
    assert takes(*planes, 4)
    assert not takes(*planes, 0)
    assert not takes(planes[0], planes[1], None, planes[3], 4)
    for i, plane in enumerate(planes):
        shifted = list(planes)
        shifted[i] = torch.cat([plane.flatten()[:1], plane.flatten()])[1:].view(plane.shape)
        assert not takes(shifted[0], shifted[1], shifted[2], shifted[3], 4)
