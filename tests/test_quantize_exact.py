"""Weights that are ternary already: init="exact" keeps every one of them."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ternarize import TernaryConfig, TernaryLinear, TernaryOptimizer, dequantize, ternarize
from ternarize.errors import ConfigError, ConversionError
from ternarize.packing import expand_groups, groups_per_row
from ternarize.quantize import is_ternary, quantize_weight, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ternary(rows: int, in_features: int, group_size: int, dtype: torch.dtype, *, exponent: int = -6) -> Tensor:
    """[N, K] trits times a random scale of ``dtype`` a group, about 2^exponent; some groups are zeros."""
    generator = torch.Generator().manual_seed(rows + in_features)
    T = torch.randint(-1, 2, (rows, in_features), generator=generator)
    scale = torch.rand(rows, groups_per_row(in_features, group_size), generator=generator, dtype=torch.float64) + 0.5
    scale[torch.rand(scale.shape, generator=generator) < 0.1] = 0
    return T.to(dtype) * expand_groups((scale * 2.0**exponent).to(dtype), in_features, group_size)


@given(
    rows=st.integers(1, 4),
    in_features=st.integers(1, 90),
    group_size=st.sampled_from([-1, 4, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-13, 14),
)
@settings(max_examples=60, deadline=None)
def test_every_weight_stays_what_it_is(
    rows: int, in_features: int, group_size: int, dtype: torch.dtype, exponent: int
) -> None:
    weight = ternary(rows, in_features, group_size, dtype, exponent=exponent)
    config = TernaryConfig(group_size=group_size, init="exact")
    quantized = quantize_weight(weight, config)
    assert quantized.E_mantissa is not None
    layer = TernaryLinear.from_levels(quantized.levels, quantized.E, config=config, E_mantissa=quantized.E_mantissa)
    layer.dtype = dtype
    back = dequantize(layer).get_parameter("weight")
    assert back.dtype == dtype
    assert torch.equal(back, weight)
    assert relative_error(weight, quantized, group_size) == 0
    assert quantized.T_accum is not None
    assert not quantized.T_accum.any()
    # As many groups as can be have no mantissa.
    assert (quantized.E_mantissa % 2).eq(1).all()


@pytest.mark.parametrize(
    ("dtype", "mantissas"),
    [(torch.bfloat16, torch.uint8), (torch.float16, torch.int16), (torch.float32, torch.int32)],
    ids=str,
)
def test_a_mantissa_has_the_bits_of_its_dtype(dtype: torch.dtype, mantissas: torch.dtype) -> None:
    # All significant bits are set.
    largest = torch.tensor(2.0, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype))
    quantized = quantize_weight(largest * torch.tensor([[1, 0, -1, 1]]).to(dtype), TernaryConfig(init="exact"))
    assert quantized.E_mantissa is not None
    assert quantized.E_mantissa.dtype == mantissas
    assert int(quantized.E_mantissa) * 2.0 ** int(quantized.E) == float(largest)


def test_groups_of_zeros_get_the_exponent_of_an_untrained_layer() -> None:
    quantized = quantize_weight(torch.zeros(2, 64), TernaryConfig(group_size=32, init="exact"))
    assert quantized.E.eq(-4).all()
    assert quantized.E_mantissa is not None
    assert quantized.E_mantissa.eq(1).all()
    # They say nothing about what the weight is.
    assert not is_ternary(torch.zeros(2, 64), 32)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[0.5, 0.0, 0.25, -0.5]]), "w is not ternary: .* magnitudes 0.25 and 0.5.* smaller group size"),
        (torch.tensor([[0.5, torch.nan]]), "w holds NaN"),
        (torch.tensor([[2.0**-140, 0.0]]), "w has a scale of 7.17465e-43"),
        (torch.ones(1, 4, dtype=torch.float64), "w is torch.float64: init='exact' takes one of bfloat16"),
    ],
)
def test_other_weights_are_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        quantize_weight(weight, TernaryConfig(init="exact"), name="w")


def test_more_planes_are_refused() -> None:
    with pytest.raises(ConfigError, match="in one plane: planes=3"):
        TernaryConfig(init="exact", planes=3)


class Model(nn.Module):
    """Two ternary layers, the second with scales that are powers of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 64), nn.Linear(64, 32, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(ternary(64, 96, 32, torch.float32))
            self.second.weight.copy_(ternary(32, 64, 32, torch.float32).sign() * 0.125)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def test_a_ternary_model_computes_what_it_did() -> None:
    model = Model()
    made: Any = ternarize(copy.deepcopy(model), TernaryConfig(group_size=32, init="exact"))
    assert [row.weight_error for row in made.ternary_report.layers] == [0, 0]
    first, second = made.first, made.second
    assert first.E_mantissa is not None
    assert second.E_mantissa is None
    x = torch.randn(5, 96)
    torch.testing.assert_close(made(x), model(x))
    assert torch.equal(dequantize(made).get_parameter("first.weight"), model.first.weight)


def test_it_trains_on_from_there() -> None:
    model: Any = ternarize(Model(), TernaryConfig(group_size=32, init="exact"))
    optimizer = TernaryOptimizer(model, lr=0.5)
    before = copy.deepcopy(model.first.state_dict())
    for _ in range(3):
        model(torch.randn(64, 96)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.first.T_packed, before["T_packed"])
    assert torch.equal(model.first.E_mantissa, before["E_mantissa"])


def test_a_model_that_is_not_ternary_is_left_alone() -> None:
    model = Model()
    with torch.no_grad():
        model.second.weight[3, 5] = 1.0
    with pytest.raises(ConversionError, match="the weight of 'second' is not ternary"):
        ternarize(model, init="exact", group_size=32, inplace=True)
    assert isinstance(model.first, nn.Linear)
