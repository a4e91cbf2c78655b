"""What is not finite changes no bit: NaN and Inf put into loss, activation and gradient, in eager mode.

The twin of a model that met something non-finite is a copy that never did. Both end bit for bit alike.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, TernaryLinear, TernaryOptimizer, build_optimizer
from ternarize.errors import NonFiniteError

FORMS = {
    "int8": TernaryConfig(group_size=8),
    "int4": TernaryConfig(group_size=8, accumulator="int4"),
    "sign": TernaryConfig(group_size=8, rule="sign"),
    "int8 with exponents": TernaryConfig(group_size=8, train_exponents=True),
}
every_form = pytest.mark.parametrize("form", FORMS)
both_values = pytest.mark.parametrize("value", [torch.nan, torch.inf])


def make_layer(in_features: int, out_features: int, form: str) -> TernaryLinear:
    levels = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    E = torch.full((out_features, -(-in_features // 8)), -2, dtype=torch.int8)
    return TernaryLinear.from_levels(levels, E, config=FORMS[form], trainable=True)


class Branches(nn.Module):
    """A gain, a shared layer, then two branches that do not see each other."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))
        self.trunk = make_layer(16, 16, form)
        self.left = make_layer(16, 8, form)
        self.right = make_layer(16, 8, form)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.trunk(x * self.gain))
        return torch.cat([self.left(h), self.right(h)], -1)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    loss: Tensor = (model(x) - x).square().mean()
    return loss


def poison_loss(model: Branches, value: float) -> Tensor:
    return loss_of(model, 1) * value


def poison_activation(model: Branches, value: float) -> Tensor:
    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_fill(0, torch.tensor([3]), value)

    with model.trunk.register_forward_hook(replace):
        return loss_of(model, 1)


def poison_gradient(model: Branches, value: float) -> Tensor:
    """One entry of the gradient that reaches ``left`` and, through it, ``trunk`` and ``gain``; never ``right``."""

    def poison(gradient: Tensor) -> Tensor:
        poisoned = gradient.clone()
        poisoned[2, 5] = value
        return poisoned

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(poison)

    with model.left.register_forward_hook(watch):
        return loss_of(model, 1)


every_poison = pytest.mark.parametrize("poison", [poison_loss, poison_activation, poison_gradient])
Poison = Callable[[Branches, float], Tensor]


def good_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    loss_of(model, seed).backward()
    optimizer.step()
    optimizer.zero_grad()


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of all that a step may change, without the count of refused steps."""
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry.pop("skipped_steps", None)
    return [copy.deepcopy(model.state_dict()), state]


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def learned(model: nn.Module, before: list[dict[str, Any]]) -> bool:
    """Whether every layer's trits or accumulators differ from what they were."""
    state = model.state_dict()
    return all(
        any(not torch.equal(state[f"{name}.{part}"], before[0][f"{name}.{part}"]) for part in ("T_packed", "T_accum"))
        for name in ("trunk", "left", "right")
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@every_form
@both_values
@every_poison
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_nothing_changes_and_the_next_step_is_as_if_it_had_not_been(
    form: str, value: float, poison: Poison, skip_nonfinite: bool
) -> None:
    model = Branches(form)
    twin = copy.deepcopy(model)
    # A threshold of 1 makes every vote a step, so that nothing can hide in an accumulator.
    options: dict[str, Any] = {"threshold": 1, "exponent_threshold": 1, "skip_nonfinite": skip_nonfinite}
    optimizer, twins = TernaryOptimizer(model, **options), TernaryOptimizer(twin, **options)
    good_step(model, optimizer, 0)
    before = states(model, optimizer)

    poison(model, value).backward()
    if skip_nonfinite:
        optimizer.step()
    else:
        with pytest.raises(NonFiniteError):
            optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(states(model, optimizer), before)

    # No zero_grad in between: the refused step has emptied the stage itself.
    good_step(model, optimizer, 2)
    good_step(twin, twins, 0)
    good_step(twin, twins, 2)
    assert_same(states(model, optimizer), states(twin, twins))
    assert learned(model, before)


@every_form
@both_values
def test_a_loss_that_is_not_finite_refuses_finite_gradients(form: str, value: float) -> None:
    model = Branches(form)
    optimizer = TernaryOptimizer(model, threshold=1)
    good_step(model, optimizer, 0)
    before = states(model, optimizer)
    loss = loss_of(model, 1)
    loss.backward()
    with pytest.raises(NonFiniteError, match="nothing was changed: the loss not finite"):
        optimizer.step(loss=loss * value)
    assert_same(states(model, optimizer), before)

    def closure() -> float:
        loss_of(model, 1).backward()
        return value

    with pytest.raises(NonFiniteError, match="the loss not finite"):
        optimizer.step(closure)
    assert_same(states(model, optimizer), before)
    loss_of(model, 1).backward()
    optimizer.step(loss=loss)
    assert learned(model, before)


def test_the_error_names_the_layers_and_what_was_not_finite() -> None:
    model = Branches("int8")
    optimizer = TernaryOptimizer(model)
    poison_gradient(model, torch.inf).backward()
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step(loss=torch.nan)
    message = str(caught.value)
    assert "gradient of layer 'trunk', gradient of layer 'left', the loss not finite" in message
    assert "right" not in message


def test_one_bad_micro_batch_refuses_the_whole_step() -> None:
    model = Branches("sign")
    optimizer = TernaryOptimizer(model, skip_nonfinite=True, threshold=1)
    before = states(model, optimizer)
    loss_of(model, 0).backward()
    poison_gradient(model, torch.nan).backward()
    loss_of(model, 2).backward()
    optimizer.step()
    assert_same(states(model, optimizer), before)


def test_refused_steps_are_counted_and_the_count_is_saved() -> None:
    model = Branches("int8")
    optimizer = TernaryOptimizer(model, skip_nonfinite=True)
    for _ in range(3):
        optimizer.step(loss=torch.inf)
    optimizer.step(loss=1.0)
    resumed = TernaryOptimizer(model, skip_nonfinite=True)
    resumed.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps == resumed.skipped_steps == 3


def test_skipping_does_not_wait_for_the_device() -> None:
    # A meta tensor has no values: reading one, which is what would wait, is an error.
    layer = TernaryLinear(16, 8, config=FORMS["int8"], device="meta")
    TernaryOptimizer(layer, skip_nonfinite=True).step(loss=torch.empty((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        TernaryOptimizer(layer, skip_nonfinite=False).step()


# Float parameters beside the ternary layers.


@both_values
@every_poison
@pytest.mark.parametrize("fused", [False, True])
def test_a_refused_step_changes_neither_floats_nor_integers(value: float, poison: Poison, fused: bool) -> None:
    model = Branches("int8")
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 1e-2, "fused": fused, "ternary": {"skip_nonfinite": True}}
    optimizer, twins = build_optimizer(model, **options), build_optimizer(twin, **options)
    good_step(model, optimizer, 0)
    before = states(model, optimizer)
    poison(model, value).backward()
    optimizer.step()
    assert_same(states(model, optimizer), before)
    optimizer.zero_grad()
    good_step(model, optimizer, 2)
    good_step(twin, twins, 0)
    good_step(twin, twins, 2)
    assert_same(states(model, optimizer), states(twin, twins))
    assert not torch.equal(model.gain, before[0]["gain"])


def test_a_bad_gradient_of_a_float_parameter_alone_refuses_the_integers() -> None:
    model = Branches("sign")
    optimizer = build_optimizer(model, ternary={"threshold": 1})
    before = states(model, optimizer)
    loss_of(model, 0).backward()
    assert model.gain.grad is not None
    model.gain.grad[3] = torch.inf
    with pytest.raises(NonFiniteError, match="nothing was changed: gradient of 'gain' not finite"):
        optimizer.step()
    assert_same(states(model, optimizer), before)


def test_large_but_finite_gradients_are_not_refused() -> None:
    model = Branches("sign")
    optimizer = build_optimizer(model)
    loss_of(model, 0).backward()
    assert model.gain.grad is not None
    # Its square is not a float32 any more.
    model.gain.grad[3] = 1e30
    optimizer.step()
