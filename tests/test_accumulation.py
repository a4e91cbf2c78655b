"""Several backward calls before a step, and graphs that share a layer or recompute it, in eager mode."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternarize import TernaryConfig, TernaryLinear, TernaryOptimizer

FORMS = {
    "int8": TernaryConfig(group_size=16),
    "int4": TernaryConfig(group_size=16, accumulator="int4"),
    "sign": TernaryConfig(group_size=16, rule="sign"),
}
every_form = pytest.mark.parametrize("form", FORMS)


def make_layer(in_features: int, out_features: int, form: str = "int8", *, trit: int | None = None) -> TernaryLinear:
    """A trainable layer of one trit value, or of random ones."""
    shape = (out_features, in_features)
    levels = torch.randint(-1, 2, shape, dtype=torch.int8) if trit is None else torch.full(shape, trit).to(torch.int8)
    # Outputs of about the size of the inputs: two thirds of the weights are ±2^E.
    exponent = -round(torch.tensor(2 / 3 * in_features).sqrt().log2().item())
    E = torch.full((out_features, -(-in_features // 16)), exponent, dtype=torch.int8)
    return TernaryLinear.from_levels(levels, E, config=FORMS[form], trainable=True)


def push(layer: TernaryLinear, optimizer: TernaryOptimizer, gradient: float, steps: int) -> None:
    """Steps under a gradient that is the same for every weight."""
    for _ in range(steps):
        (layer(torch.ones(1, layer.in_features)).sum() * gradient).backward()
        optimizer.step()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the tensors of a module's state that differ from an earlier state."""
    state = module.state_dict()
    assert state.keys() == before.keys()
    return [name for name in state if not torch.equal(state[name], before[name])]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_micro_batches_of_equal_gradients_step_as_one_of_them(form: str) -> None:
    once = make_layer(16, 8, form, trit=1)
    thrice = copy.deepcopy(once)
    for layer, batches in ((once, 1), (thrice, 3)):
        optimizer = TernaryOptimizer(layer)
        push(layer, optimizer, 1.0, 1)
        for _ in range(batches):
            # Far above the statistics, so that every staged integer is the limit 4, whatever the random bits.
            (100 * layer(torch.ones(1, 16)).sum()).backward()
        assert layer.stage is not None
        assert (layer.stage == 4 * batches).all()
        optimizer.step()
    assert changed(thrice, once.state_dict()) == []


def test_votes_of_micro_batches_add_up_under_sign() -> None:
    layer = make_layer(16, 8, "sign", trit=1)
    optimizer = TernaryOptimizer(layer)
    for _ in range(3):
        layer(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    assert layer.T_accum is not None
    assert (layer.T_accum == -3).all()


@every_form
def test_activation_checkpointing_changes_no_integer(form: str) -> None:
    plain = nn.Sequential(make_layer(16, 32, form), nn.ReLU(), make_layer(32, 16, form))
    recomputed = copy.deepcopy(plain)
    x = torch.randn(8, 16)
    for model in (plain, recomputed):
        optimizer = TernaryOptimizer(model)
        for _ in range(4):
            y = model(x) if model is plain else checkpoint(model, x, use_reentrant=False)
            (y - x).square().mean().backward()
            optimizer.step()
    assert changed(recomputed, plain.state_dict()) == []


@every_form
def test_a_layer_used_twice_stages_both_gradients(form: str) -> None:
    layer = make_layer(16, 16, form)
    before = snapshot(layer)
    optimizer = TernaryOptimizer(layer)
    for _ in range(2):
        layer(torch.relu(layer(torch.randn(8, 16)))).sum().backward()
        assert layer.status.tolist() == [0, 2]
        optimizer.step()
        assert layer.status.tolist() == [0, 0]
    assert "T_accum" in changed(layer, before)


def test_two_forwards_before_two_backwards_stage_both() -> None:
    layer = make_layer(16, 8, "sign", trit=1)
    optimizer = TernaryOptimizer(layer)
    first, second = layer(torch.ones(1, 16)), layer(torch.ones(2, 16))
    first.sum().backward()
    second.sum().backward()
    optimizer.step()
    assert layer.T_accum is not None
    assert (layer.T_accum == -2).all()


def test_a_step_between_forward_and_backward_is_an_error() -> None:
    layer = make_layer(16, 8)
    optimizer = TernaryOptimizer(layer)
    y = layer(torch.ones(1, 16, requires_grad=True))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
