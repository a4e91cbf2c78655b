"""Several backward calls before a step, and graphs that share a layer or recompute it, in eager mode."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ternarize import TernaryOptimizer
from tests.optim_kit import changed, every_form, make_layer, push, snapshot


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
