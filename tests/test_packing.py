"""The packed format: every byte of it, for every row length and group size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ternarize.errors import ConfigError
from ternarize.packing import (
    E_MAX,
    E_MIN,
    ROW,
    combine_planes,
    dequantize,
    exp2_exact,
    groups_per_row,
    has_illegal_code,
    largest_level,
    pack,
    split_planes,
    unpack,
)

group_sizes = st.one_of(st.just(ROW), st.integers(1, 40).map(lambda n: 4 * n))


def random_trits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 3), in_features=st.integers(1, 200), group_size=group_sizes, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack_for_any_row_length_and_group_size(
    rows: int, in_features: int, group_size: int, seed: int
) -> None:
    T = random_trits(rows, in_features, seed=seed)
    T_packed = pack(T, group_size)
    assert T_packed.shape == (rows, -(-in_features // 4))
    assert T_packed.dtype == torch.uint8
    assert torch.equal(unpack(T_packed, in_features, group_size), T)
    assert not has_illegal_code(T_packed)


@given(planes=st.sampled_from([2, 3]), in_features=st.integers(1, 70), group_size=group_sizes)
@settings(max_examples=40, deadline=None)
def test_planes_pack_one_by_one(planes: int, in_features: int, group_size: int) -> None:
    T = random_trits(planes, 2, in_features)
    T_packed = pack(T, group_size)
    assert torch.equal(T_packed, torch.stack([pack(plane, group_size) for plane in T]))
    assert torch.equal(unpack(T_packed, in_features, group_size), T)


def test_bytes_of_whole_groups_are_group_planar() -> None:
    # Two groups of 8: byte c of a group holds trits c, c+2, c+4, c+6, lowest bits first.
    T = torch.tensor([[1, 0, -1, 0, 0, 1, 1, -1, 0, -1, 0, 0, 0, 0, 0, 1]], dtype=torch.int8)
    expected = [0b01_00_11_01, 0b11_01_00_00, 0b00_00_00_00, 0b01_00_00_11]
    assert pack(T, 8).tolist() == [expected]


def test_tail_group_has_its_own_stride_and_pads_with_code_00() -> None:
    # K = 14 in groups of 8: the tail of 6 takes 2 bytes, with trits 0, 2, 4 and 1, 3, 5 of it.
    T = torch.ones(1, 14, dtype=torch.int8)
    assert pack(T, 8).tolist() == [[0b01_01_01_01, 0b01_01_01_01, 0b00_01_01_01, 0b00_01_01_01]]


def test_a_row_is_one_group_where_the_group_is_longer_or_minus_one() -> None:
    T = random_trits(3, 37)
    assert torch.equal(pack(T, ROW), pack(T, 40))
    assert torch.equal(pack(T, ROW), pack(T, 128))
    assert not torch.equal(pack(T, ROW), pack(T, 4))
    assert groups_per_row(37, ROW) == groups_per_row(37, 40) == 1
    assert groups_per_row(37, 4) == 10


@pytest.mark.parametrize("place", range(4))
def test_illegal_code_is_found_in_every_place_of_a_byte(place: int) -> None:
    packed = pack(random_trits(4, 64), 32)
    packed[2, 5] = (packed[2, 5] & ~(3 << 2 * place)) | (2 << 2 * place)
    assert has_illegal_code(packed)
    assert (unpack(packed, 64, 32) == -2).sum() == 1


@pytest.mark.parametrize("group_size", [0, 6, -4, 130])
def test_group_size_that_is_no_multiple_of_four_is_refused(group_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"group_size {group_size} is not a positive multiple of 4.*use 32"):
        pack(random_trits(2, 8), group_size)


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_planes_hold_every_level_up_to_the_largest(planes: int) -> None:
    largest = largest_level(planes)
    levels = torch.arange(-largest, largest + 1, dtype=torch.int8)[None]
    T = split_planes(levels, planes)
    assert T.shape == (planes, 1, 3**planes)
    assert T.abs().max() == 1
    assert torch.equal(combine_planes(T), levels)


def test_most_significant_plane_comes_first() -> None:
    assert split_planes(torch.tensor([[5]]), 3).flatten().tolist() == [1, -1, -1]


def test_exp2_is_exact_over_the_whole_range_of_exponents() -> None:
    E = torch.arange(E_MIN, E_MAX + 1, dtype=torch.int8)
    assert exp2_exact(E).tolist() == [2.0 ** int(e) for e in E]


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("in_features", "group_size"), [(100, 32), (64, 64), (30, ROW)])
def test_dequantize_with_mantissa_is_the_float64_product(planes: int, in_features: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(planes)
    levels = torch.randint(-largest_level(planes), largest_level(planes) + 1, (5, in_features), generator=generator)
    groups = groups_per_row(in_features, group_size)
    E = torch.randint(-30, 30, (5, groups), generator=generator, dtype=torch.int8)
    mantissa = torch.randint(128, 256, (5, groups), generator=generator).to(torch.uint8)
    T = split_planes(levels.to(torch.int8), planes)
    T_packed = pack(T if planes > 1 else T[0], group_size)

    size = in_features if groups == 1 else group_size
    scale = mantissa.double() * torch.tensor([[2.0 ** int(e) for e in row] for row in E], dtype=torch.float64)
    expected = torch.stack([levels[:, k] * scale[:, k // size] for k in range(in_features)], 1)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(dequantize(T_packed, E, mantissa, in_features, group_size, dtype).double(), expected)
    rounded = dequantize(T_packed, E, mantissa, in_features, group_size, torch.bfloat16)
    assert torch.equal(rounded, expected.to(torch.bfloat16))


def test_mantissa_of_a_row_or_a_tensor_broadcasts() -> None:
    T_packed, E = pack(random_trits(4, 64), 32), torch.zeros(4, 2, dtype=torch.int8)
    for shape in ((4, 1), (1, 1)):
        mantissa = torch.full(shape, 3, dtype=torch.int16)
        dense = dequantize(T_packed, E, mantissa, 64, 32, torch.float32)
        assert torch.equal(dense, 3 * unpack(T_packed, 64, 32).float())
