"""Rounding of dense weights and biases to integers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternarize import TernaryConfig, packing
from ternarize.config import Accumulator, Init
from ternarize.errors import ConversionError, ShapeError
from ternarize.packing import E_MAX, E_MIN, ROW, groups_per_row, largest_level
from ternarize.quantize import Quantized, quantize_bias, quantize_weight, relative_error

INITS: tuple[tuple[Init, int], ...] = (
    ("absmean", 1),
    ("least_squares", 1),
    ("least_squares", 2),
    ("least_squares", 3),
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(quantized: Quantized, group_size: int) -> Tensor:
    """float64 levels · 2^E, weight by weight, with Python's own powers."""
    size = quantized.levels.shape[1] if group_size == ROW else group_size
    columns = range(quantized.levels.shape[1])
    scale = torch.tensor([[2.0 ** int(row[k // size]) for k in columns] for row in quantized.E], dtype=torch.float64)
    return quantized.levels * scale


@given(
    rows=st.integers(1, 4),
    in_features=st.integers(1, 90),
    group_size=st.sampled_from([ROW, 4, 32, 64, 128]),
    case=st.sampled_from(INITS),
    magnitude=st.integers(-140, 120),
)
@settings(max_examples=80, deadline=None)
def test_levels_and_exponents_stay_in_range_for_any_shape_and_magnitude(
    rows: int, in_features: int, group_size: int, case: tuple[Init, int], magnitude: int
) -> None:
    init, planes = case
    config = TernaryConfig(group_size=group_size, init=init, planes=planes)  # type: ignore[arg-type]  # drawn from 1 to 3
    weight = (normal(rows, in_features, dtype=torch.float64) * 2.0**magnitude).to(torch.float32)
    quantized = quantize_weight(weight, config)
    assert quantized.levels.shape == (rows, in_features)
    assert quantized.E.shape == (rows, groups_per_row(in_features, group_size))
    assert quantized.levels.abs().max() <= largest_level(planes)
    assert quantized.E.min() >= E_MIN
    assert quantized.E.max() <= E_MAX
    assert torch.isfinite(dense(quantized, min(group_size, in_features)).to(torch.float32)).all()


@pytest.mark.parametrize(("init", "planes"), INITS)
def test_the_largest_float32_stays_finite(init: Init, planes: int) -> None:
    config = TernaryConfig(group_size=4, init=init, planes=planes)  # type: ignore[arg-type]
    quantized = quantize_weight(torch.full((1, 4), torch.finfo(torch.float32).max), config)
    assert torch.isfinite(dense(quantized, 4).to(torch.float32)).all()
    assert quantized.levels.all()


def test_absmean_is_the_power_of_two_nearest_to_the_mean_magnitude() -> None:
    weight = normal(6, 100)
    quantized = quantize_weight(weight, TernaryConfig(group_size=32))
    for n in range(6):
        for g, group in enumerate(weight[n].split(32)):
            e = round(math.log2(group.abs().double().mean()))
            assert quantized.E[n, g] == e
            expected = [max(-1, min(1, round(float(w) / 2.0**e))) for w in group]
            assert quantized.levels[n, 32 * g : 32 * (g + 1)].tolist() == expected


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("group_size", [16, 64, ROW])
def test_least_squares_finds_the_best_power_of_two(planes: int, group_size: int) -> None:
    # A heavy tail, so that cutting outliers off pays.
    weight = normal(8, 72, dtype=torch.float64) ** 3
    config = TernaryConfig(group_size=group_size, init="least_squares", planes=planes)  # type: ignore[arg-type]
    quantized = quantize_weight(weight.float(), config)
    largest = largest_level(planes)
    size = 72 if group_size == ROW else group_size
    for n in range(8):
        for g, group in enumerate(weight[n].split(size)):
            errors = {
                e: float(((group / 2.0**e).round().clamp(-largest, largest) * 2.0**e - group).square().sum())
                for e in range(-20, 10)
            }
            assert errors[int(quantized.E[n, g])] == pytest.approx(min(errors.values()), rel=1e-6)


def test_more_planes_leave_less_error() -> None:
    weight = 0.05 * normal(64, 256)
    errors = []
    for init, planes in INITS:
        config = TernaryConfig(group_size=64, init=init, planes=planes)  # type: ignore[arg-type]
        errors.append(relative_error(weight, quantize_weight(weight, config), 64))
    assert errors == sorted(errors, reverse=True)
    # Gaussian weights, about as the weights of trained models.
    assert errors[1:] == pytest.approx([0.19, 0.034, 0.006], rel=0.1)


def test_relative_error_is_the_squared_error_over_the_squared_weight() -> None:
    weight = normal(5, 70)
    quantized = quantize_weight(weight, TernaryConfig(group_size=32))
    expected = (dense(quantized, 32) - weight).square().sum() / weight.double().square().sum()
    assert relative_error(weight, quantized, 32) == pytest.approx(float(expected))
    assert relative_error(torch.zeros(2, 8), quantize_weight(torch.zeros(2, 8), TernaryConfig()), 128) == 0.0


@pytest.mark.parametrize(("accumulator", "theta"), [("int8", 127), ("int4", 7)])
def test_accumulator_starts_at_the_remainder_of_rounding(accumulator: Accumulator, theta: int) -> None:
    weight = normal(6, 64)
    quantized = quantize_weight(weight, TernaryConfig(group_size=32, accumulator=accumulator))
    assert quantized.T_accum is not None
    accum = quantized.T_accum
    if accumulator == "int4":
        assert torch.equal(accum >> 4, torch.zeros_like(accum)), "momentum, the high nibble, starts at 0"
        accum = (accum << 4) >> 4
    scale = torch.exp2(quantized.E.double()).repeat_interleave(32, 1)
    position = quantized.levels + accum.double() / (2 * theta)
    inside = (weight / scale).abs() < 1.5
    assert inside.any()
    assert (position - weight / scale)[inside].abs().max() <= 0.5 / (2 * theta) + 1e-6
    # Beyond, the accumulator is as far out as it goes.
    assert torch.equal(accum[~inside], (theta * weight[~inside].sign()).to(torch.int8))


def test_accumulator_of_the_sign_rule_starts_at_zero_and_layers_that_do_not_train_have_none() -> None:
    sign = quantize_weight(normal(4, 32), TernaryConfig(rule="sign")).T_accum
    assert sign is not None
    assert not sign.any()
    assert quantize_weight(normal(4, 32), TernaryConfig(planes=2)).T_accum is None
    assert quantize_weight(normal(4, 32), TernaryConfig(), trainable=False).T_accum is None


@pytest.mark.parametrize(("init", "planes"), INITS)
def test_groups_of_zeros_get_zeros_and_the_exponent_of_an_untrained_layer(init: Init, planes: int) -> None:
    weight = normal(3, 64)
    weight[1, 32:] = 0
    config = TernaryConfig(group_size=32, init=init, planes=planes)  # type: ignore[arg-type]
    quantized = quantize_weight(weight, config)
    assert not quantized.levels[1, 32:].any()
    # uniform(-1/8, 1/8) has a mean magnitude of 2^-4.
    assert quantized.E[1, 1] == -4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("init", "planes"), INITS)
def test_dtype_of_the_weight_changes_nothing_but_its_own_rounding(dtype: torch.dtype, init: Init, planes: int) -> None:
    config = TernaryConfig(group_size=32, init=init, planes=planes)  # type: ignore[arg-type]
    weight = normal(4, 70, dtype=dtype)
    given, single = quantize_weight(weight, config), quantize_weight(weight.float(), config)
    assert torch.equal(given.levels, single.levels)
    assert torch.equal(given.E, single.E)


def test_strips_of_rows_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, config = normal(37, 100), TernaryConfig(group_size=32)
    whole = quantize_weight(weight, config)
    monkeypatch.setattr(packing, "WORKSPACE_BYTES", 96 * 100 * 5)
    assert len(list(packing.row_strips(37, 100))) == 8
    strips = quantize_weight(weight, config)
    assert torch.equal(whole.levels, strips.levels)
    assert torch.equal(whole.E, strips.E)
    assert whole.T_accum is not None
    assert strips.T_accum is not None
    assert torch.equal(whole.T_accum, strips.T_accum)
    assert relative_error(weight, strips, 32) == pytest.approx(
        float((dense(strips, 32) - weight).square().sum() / weight.double().square().sum())
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weight_and_bias_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight = normal(4, 32)
    weight[3, 31] = bad
    with pytest.raises(ConversionError, match=r"^mlp.up holds NaN, Inf .*exclude this layer"):
        quantize_weight(weight, TernaryConfig(), name="mlp.up")
    with pytest.raises(ConversionError, match=r"^mlp.bias holds NaN, Inf"):
        quantize_bias(weight[3], name="mlp.bias")


def test_float64_weight_beyond_float32_is_refused() -> None:
    with pytest.raises(ConversionError, match="beyond float32"):
        quantize_weight(torch.full((1, 4), 1e300, dtype=torch.float64), TernaryConfig())


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(2, 4, 4), torch.zeros(4, 4, dtype=torch.int8)])
def test_only_floating_point_matrices_are_quantised(weight: Tensor) -> None:
    with pytest.raises(ShapeError, match="only floating-point matrices"):
        quantize_weight(weight, TernaryConfig())


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), min_size=1, max_size=9),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=100, deadline=None)
def test_bias_is_kept_to_31_bits_of_its_largest_entry(values: list[float], dtype: torch.dtype) -> None:
    bias = torch.tensor(values, dtype=dtype)
    integers, exponent = quantize_bias(bias)
    assert integers.dtype == torch.int32
    assert exponent.dtype == torch.int8
    assert exponent.shape == (1,)
    restored = integers.double() * 2.0 ** int(exponent)
    # The exponent stops at -126: below that an entry is under 2^-127 off.
    bound = max(float(bias.abs().max()) * 2.0**-31, 2.0**-127)
    assert (restored - bias.double()).abs().max() <= bound


def test_largest_entry_of_a_bias_uses_the_whole_int32_range() -> None:
    integers, exponent = quantize_bias(torch.tensor([0.75, -1.0, 2.0**-31]))
    assert integers.tolist() == [3 * 2**28, -(2**30), 0]
    assert exponent.tolist() == [-30]
    assert quantize_bias(torch.tensor([0.75]))[0].item() == 3 * 2**29
    assert quantize_bias(torch.zeros(3))[0].tolist() == [0, 0, 0]
