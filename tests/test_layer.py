"""TernaryLinear as a module: integer state through everything that PyTorch does to modules."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, TernaryLinear, freeze, ternarize
from ternarize.errors import ConfigError, ShapeError, TernarizeError
from ternarize.layer import TRAINING_STATE
from ternarize.packing import pack, split_planes, unpack
from ternarize.quantize import quantize_weight


def from_dense(config: TernaryConfig, *, bias: bool = True, trainable: bool = False) -> TernaryLinear:
    torch.manual_seed(0)
    layer = ternarize(nn.Linear(70, 12, bias=bias), config, trainable=trainable)
    assert isinstance(layer, TernaryLinear)
    return layer


def with_mantissa() -> TernaryLinear:
    config = TernaryConfig(group_size=32)
    quantized = quantize_weight(torch.randn(12, 70), config)
    mantissa = torch.randint(128, 256, quantized.E.shape).to(torch.uint8)
    return TernaryLinear.from_levels(quantized.levels, quantized.E, config=config, E_mantissa=mantissa)


def frozen() -> TernaryLinear:
    layer = from_dense(TernaryConfig(group_size=32), trainable=True)
    freeze(layer)
    return layer


def on_meta() -> TernaryLinear:
    return TernaryLinear(70, 12, device="meta")


WAYS: dict[str, Callable[[], TernaryLinear]] = {
    "factored int8": lambda: from_dense(TernaryConfig(group_size=32), trainable=True),
    "factored int4": lambda: from_dense(TernaryConfig(group_size=32, accumulator="int4"), trainable=True),
    "factored with exponents": lambda: from_dense(TernaryConfig(group_size=32, train_exponents=True), trainable=True),
    "sign": lambda: from_dense(TernaryConfig(group_size=32, rule="sign"), trainable=True),
    "no bias": lambda: from_dense(TernaryConfig(group_size=32), bias=False, trainable=True),
    "whole rows": lambda: from_dense(TernaryConfig(group_size=-1), trainable=True),
    "inference": lambda: from_dense(TernaryConfig(group_size=32)),
    "frozen": frozen,
    "two planes": lambda: from_dense(TernaryConfig(group_size=32, planes=2)),
    "three planes": lambda: from_dense(TernaryConfig(group_size=32, planes=3)),
    "mantissa": with_mantissa,
    "new": lambda: TernaryLinear(70, 12),
    "meta": on_meta,
}


@pytest.fixture(params=WAYS)
def layer(request: pytest.FixtureRequest) -> TernaryLinear:
    return WAYS[request.param]()


@pytest.fixture(params=[way for way in WAYS if way != "meta"])
def layer_with_data(request: pytest.FixtureRequest) -> TernaryLinear:
    return WAYS[request.param]()


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    state_a, state_b = a.state_dict(), b.state_dict()
    assert list(state_a) == list(state_b)
    for name, tensor in state_a.items():
        assert tensor.dtype == state_b[name].dtype
        assert torch.equal(tensor, state_b[name]), name


def test_no_way_to_make_a_layer_gives_it_a_float_parameter_or_buffer(layer: TernaryLinear) -> None:
    assert list(layer.parameters())
    assert sum(p.is_floating_point() for p in layer.parameters()) == 0
    assert not any(p.requires_grad for p in layer.parameters())
    assert list(layer.buffers()) == []


def test_trainable_layers_hold_the_state_of_their_rule_and_form() -> None:
    held = {way: {name for name in TRAINING_STATE if getattr(WAYS[way](), name) is not None} for way in WAYS}
    factored = {"T_accum", "T_momentum", "row_log2", "col_log2"}
    assert held["factored int8"] == factored
    assert held["factored int4"] == factored - {"T_momentum"}
    assert held["factored with exponents"] == factored | {"E_accum"}
    assert held["sign"] == {"T_accum", "E_accum"}
    assert held["inference"] == held["frozen"] == held["two planes"] == held["mantissa"] == set()


def test_state_dict_round_trip_is_bit_equal(layer_with_data: TernaryLinear) -> None:
    other = copy.deepcopy(layer_with_data)
    for parameter in other.parameters():
        parameter.zero_()
    other.load_state_dict(layer_with_data.state_dict())
    assert_same_state(other, layer_with_data)


def test_weights_only_save_and_load_is_bit_equal(layer_with_data: TernaryLinear) -> None:
    file = io.BytesIO()
    torch.save(layer_with_data.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state.keys() == layer_with_data.state_dict().keys()
    assert all(torch.equal(tensor, layer_with_data.state_dict()[name]) for name, tensor in state.items())


def test_casts_of_the_model_leave_integers_alone(layer_with_data: TernaryLinear) -> None:
    before = copy.deepcopy(layer_with_data)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_same_state(layer_with_data.to(dtype), before)
    assert_same_state(layer_with_data.half(), before)
    # What reads weight.dtype to cast its input, as transformers' T5 does, must see the cast.
    assert layer_with_data.weight.dtype == torch.float16


def test_deepcopy_is_equal_and_shares_nothing(layer_with_data: TernaryLinear) -> None:
    other = copy.deepcopy(layer_with_data)
    assert_same_state(other, layer_with_data)
    x = torch.randn(3, 70)
    assert torch.equal(other(x), layer_with_data(x))
    for name, parameter in other.named_parameters():
        assert parameter.data_ptr() != layer_with_data.get_parameter(name).data_ptr()


def test_meta_layer_materialises_and_loads(layer_with_data: TernaryLinear) -> None:
    meta = copy.deepcopy(layer_with_data).to("meta")
    assert all(p.is_meta for p in meta.parameters())
    assert meta(torch.empty(2, 5, 70, device="meta")).shape == (2, 5, 12)
    meta.to_empty(device="cpu")
    meta.load_state_dict(layer_with_data.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(meta(x), layer_with_data(x))
    assert meta.anchor.device.type == meta.status.device.type == "cpu"


def test_output_is_that_of_the_dense_weight(layer_with_data: TernaryLinear) -> None:
    x = torch.randn(2, 3, 70, dtype=torch.float64)
    dtype, layer_with_data.dtype = layer_with_data.dtype, torch.float64
    bias = None
    if layer_with_data.bias is not None and layer_with_data.bias_exponent is not None:
        bias = layer_with_data.bias.double() * 2.0 ** layer_with_data.bias_exponent.double()
    expected = nn.functional.linear(x, layer_with_data.weight, bias)
    torch.testing.assert_close(layer_with_data(x), expected, rtol=1e-12, atol=1e-12)
    for low, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        got = layer_with_data(x.to(low))
        assert got.dtype == low
        exact = nn.functional.linear(x.to(low).double(), layer_with_data.weight, bias)
        assert (got.double() - exact).norm() <= tolerance * exact.norm()
    layer_with_data.dtype = dtype
    assert layer_with_data.weight.dtype == torch.float32


def test_gradient_of_the_input_is_that_of_the_dense_layer() -> None:
    layer = WAYS["inference"]()
    layer.dtype = torch.float64
    x = torch.randn(4, 70, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, (x,))
    grad_y = torch.randn(4, 12, dtype=torch.float64)
    (grad_x,) = torch.autograd.grad(layer(x), x, grad_y)
    torch.testing.assert_close(grad_x, grad_y @ layer.weight)


def test_a_gradient_penalty_is_that_of_the_dense_layer() -> None:
    layer = WAYS["inference"]()
    layer.dtype = torch.float64
    torch.autograd.gradgradcheck(layer, (torch.randn(4, 70, dtype=torch.float64, requires_grad=True),))


def test_a_gradient_penalty_through_a_layer_that_trains_is_an_error() -> None:
    layer = WAYS["factored int8"]()
    layer.prepare_training()
    x = torch.randn(4, 70, requires_grad=True)
    with pytest.raises(TernarizeError, match="create_graph=True reached a trainable ternary layer"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_training_pass_gives_the_gradient_of_the_input_and_fills_the_stage() -> None:
    layer = WAYS["factored int8"]()
    layer.prepare_training()
    x = torch.randn(4, 70, requires_grad=True)
    before = copy.deepcopy(layer)
    layer(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * layer(x).detach() @ layer.weight)
    assert layer.status.tolist() == [0, 1]
    assert layer.stage_row is not None
    assert layer.stage_row.any()
    assert_same_state(layer, before)


def test_layers_that_need_no_input_gradient_train_through_the_anchor() -> None:
    layer = WAYS["sign"]()
    layer.prepare_training()
    layer(torch.randn(4, 70)).sum().backward()
    assert layer.stage is not None
    assert layer.stage.any()


def test_eval_mode_and_no_grad_stage_nothing() -> None:
    layer = WAYS["sign"]()
    layer.prepare_training()
    x = torch.randn(4, 70, requires_grad=True)
    with torch.no_grad():
        assert not layer(x).requires_grad
    layer.eval()
    layer(x).sum().backward()
    assert layer.stage is not None
    assert not layer.stage.any()


def test_autocast_sets_the_dtype_of_the_output() -> None:
    layer = WAYS["inference"]()
    x = torch.randn(3, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))


def test_freeze_drops_the_state_and_keeps_the_output() -> None:
    layer = WAYS["factored int8"]()
    layer.prepare_training()
    x = torch.randn(3, 70)
    before = layer.eval()(x)
    layer.freeze()
    assert not layer.trainable
    assert set(layer.state_dict()) == {"T_packed", "E", "bias", "bias_exponent"}
    assert torch.equal(layer(x), before)
    with pytest.raises(ConfigError, match="keeps no training state: make it with trainable=True"):
        layer.prepare_training()


def test_levels_are_packed_as_planes_most_significant_first() -> None:
    levels = torch.randint(-13, 14, (12, 70), dtype=torch.int8)
    E = torch.zeros(12, 3, dtype=torch.int8)
    layer = TernaryLinear.from_levels(levels, E, config=TernaryConfig(group_size=32, planes=3))
    assert torch.equal(layer.T_packed, pack(split_planes(levels, 3), 32))
    assert torch.equal(layer.weight, levels.float())
    assert layer.planes == 3


def test_groups_as_long_as_the_row_are_rows() -> None:
    for group_size in (-1, 72, 128):
        layer = TernaryLinear(70, 12, config=TernaryConfig(group_size=group_size))
        assert layer.group_size == -1
        assert layer.E.shape == (12, 1)
    assert unpack(layer.T_packed, 70, layer.group_size).shape == (12, 70)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 60), r"got an input of shape \[3, 60\]: its last dimension must be in_features, 70"),
        # As many packed bytes as 70 take.
        (torch.zeros(3, 69), "must be in_features, 70"),
        (torch.zeros(()), "must be in_features, 70"),
        (torch.zeros(3, 70, dtype=torch.int64), "needs a floating-point tensor"),
    ],
)
def test_wrong_input_is_refused_with_what_is_needed(x: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        WAYS["inference"]()(x)


def test_exponents_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"E is \[12, 2\], need \[12, 3\]"):
        TernaryLinear.from_levels(
            torch.zeros(12, 70, dtype=torch.int8),
            torch.zeros(12, 2, dtype=torch.int8),
            config=TernaryConfig(group_size=32),
        )


def test_several_planes_cannot_be_trainable() -> None:
    with pytest.raises(ConfigError, match="use planes=1 or trainable=False"):
        TernaryLinear(70, 12, config=TernaryConfig(planes=2))


def test_repr_says_what_is_ternary_about_the_layer() -> None:
    assert "group_size=32, planes=1, rule=sign" in repr(WAYS["sign"]())
    assert "group_size=row, planes=1, rule=factored" in repr(WAYS["whole rows"]())
    assert "group_size=32, planes=3, frozen" in repr(WAYS["three planes"]())
