"""When the state changes: the modes "backward" and "hooks" beside "step", in eager mode."""

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternarize import TernaryOptimizer, build_optimizer
from ternarize.errors import NonFiniteError
from ternarize.layer import STAGE, Apply, TernaryLinear
from tests.optim_kit import changed, every_form, make_layer, push, snapshot

every_mode = pytest.mark.parametrize("mode", get_args(Apply))
unstaged = pytest.mark.parametrize("mode", ["backward", "hooks"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_model(form: str = "int8") -> nn.Sequential:
    return nn.Sequential(make_layer(16, 32, form), nn.ReLU(), make_layer(32, 16, form))


def batch(seed: int, tokens: int = 8) -> Tensor:
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x).square().sum()
    return loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()


def layers_of(model: nn.Module) -> list[TernaryLinear]:
    return [layer for layer in model.modules() if isinstance(layer, TernaryLinear)]


@every_form
@unstaged
def test_one_micro_batch_steps_as_it_does_when_staged(form: str, mode: Apply) -> None:
    model = make_model(form)
    before, twin = snapshot(model), copy.deepcopy(model)
    # Each step moves trits.
    options: dict[str, Any] = {"lr": 1.0, "threshold": 1, "exponent_threshold": 1, "seed": 5}
    optimizer, twins = TernaryOptimizer(model, apply=mode, **options), TernaryOptimizer(twin, **options)
    for seed in range(4):
        step(model, optimizer, batch(seed))
        step(twin, twins, batch(seed))
    assert changed(model, twin.state_dict()) == []
    assert [layer.rng.tolist() for layer in layers_of(model)] == [[5, 0, 4], [5, 1, 4]]
    assert "0.T_packed" in changed(model, before)


@every_form
def test_hooks_make_one_batch_of_several(form: str) -> None:
    model = make_model(form)
    twin = copy.deepcopy(model)
    optimizer, twins = TernaryOptimizer(model, apply="hooks"), TernaryOptimizer(twin)
    for seed in range(3):
        x = batch(seed, tokens=12)
        for part in x.split(4):
            loss_of(model, part).backward()
        optimizer.step()
        step(twin, twins, x)
    assert changed(model, twin.state_dict()) == []


@every_form
def test_each_backward_is_an_update_of_its_own(form: str) -> None:
    model = make_model(form)
    twin = copy.deepcopy(model)
    optimizer, twins = TernaryOptimizer(model, apply="backward"), TernaryOptimizer(twin)
    for seed in range(3):
        loss_of(model, batch(seed)).backward()
        step(twin, twins, batch(seed))
    optimizer.step()
    assert changed(model, twin.state_dict()) == []


@unstaged
def test_nothing_is_staged_and_nothing_kept_after_a_step(mode: Apply) -> None:
    model = make_model()
    optimizer = TernaryOptimizer(model, apply=mode)
    loss_of(model, batch(0)).backward()
    shapes = [[tuple(t.shape) for tensors in layer.hooks() for t in tensors] for layer in layers_of(model)]
    assert shapes == ([[(8, 32), (8, 16)], [(8, 16), (8, 32)]] if mode == "hooks" else [[], []])
    for end in (optimizer.step, optimizer.zero_grad):
        end()
        assert all(layer.hooks() == ([], []) for layer in layers_of(model))
        assert all(getattr(layer, name) is None for layer in layers_of(model) for name in STAGE)
        loss_of(model, batch(1)).backward()


def test_zero_grad_drops_what_was_kept() -> None:
    layer = make_layer(16, 8)
    optimizer = TernaryOptimizer(layer, apply="hooks")
    before = snapshot(layer)
    layer(torch.full((1, 16), torch.nan)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert changed(layer, before) == []


@every_mode
@every_form
def test_activation_checkpointing_changes_no_integer(form: str, mode: Apply) -> None:
    plain = make_model(form)
    recomputed = copy.deepcopy(plain)
    for model in (plain, recomputed):
        optimizer = TernaryOptimizer(model, apply=mode)
        for seed in range(3):
            x = batch(seed)
            y = model(x) if model is plain else checkpoint(model, x, use_reentrant=False)
            (y - x).square().mean().backward()
            optimizer.step()
    assert changed(recomputed, plain.state_dict()) == []


def test_a_layer_used_twice_is_one_gradient_under_hooks_and_an_error_inside_backward() -> None:
    layer = make_layer(16, 16)
    twin = copy.deepcopy(layer)
    optimizer = TernaryOptimizer(layer, apply="hooks")
    layer(torch.relu(layer(batch(0)))).sum().backward()
    assert [len(tensors) for tensors in layer.hooks()] == [2, 2]
    optimizer.step()
    TernaryOptimizer(twin, apply="backward")
    y = twin(torch.relu(twin(batch(0))))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Learning rates.


def test_schedulers_write_the_rate_that_backward_reads() -> None:
    layer = make_layer(16, 8, "sign", trit=1)
    optimizer = TernaryOptimizer(layer, lr=4.0, threshold=127, apply="backward")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen = []
    for _ in range(3):
        layer(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        schedule.step()
        assert layer.T_accum is not None
        seen.append(layer.T_accum[0, 0].item())
    assert seen == [-4, -6, -7]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.zero_grad()
    before = snapshot(layer)
    push(layer, optimizer, 1.0, 2)
    assert changed(layer, before) == []
    assert layer.lr is optimizer.param_groups[0]["lr"]


@every_mode
@pytest.mark.parametrize(
    "make", [torch.optim.lr_scheduler.LinearLR, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)]
)
def test_schedulers_of_torch_run_in_every_mode(mode: Apply, make: Any) -> None:
    model = nn.Sequential(make_layer(16, 16), nn.LayerNorm(16))
    optimizer = build_optimizer(model, ternary={"apply": mode})
    schedule = make(optimizer)
    first = [float(group["lr"]) for group in optimizer.param_groups]
    for seed in range(3):
        step(model, optimizer, batch(seed))
        schedule.step()
    assert all(float(group["lr"]) != lr for group, lr in zip(optimizer.param_groups, first, strict=True))


@unstaged
def test_a_resumed_run_is_bit_identical(mode: Apply) -> None:
    def make(seed: int) -> tuple[Any, ...]:
        model = nn.Sequential(make_model(), nn.LayerNorm(16))
        optimizer = build_optimizer(model, ternary={"seed": seed, "apply": mode})
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def run(trio: tuple[Any, ...], seeds: range) -> None:
        model, optimizer, schedule = trio
        for seed in seeds:
            step(model, optimizer, batch(seed))
            optimizer.zero_grad()
            schedule.step()

    straight = make(seed=3)
    run(straight, range(3))
    saved = [copy.deepcopy(part.state_dict()) for part in straight]
    run(straight, range(3, 6))
    resumed = make(seed=4)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    run(resumed, range(3, 6))
    assert changed(resumed[0], straight[0].state_dict()) == []
    assert float(resumed[1].param_groups[-1]["lr"]) == float(straight[1].param_groups[-1]["lr"])


# What is not finite.


class Branches(nn.Module):
    """Two layers that do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = make_layer(16, 8), make_layer(16, 8)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        loss: Tensor = (self.left(x) * self.gain).square().sum() * factor + self.right(x).square().sum()
        return loss


def step_twice(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # The first step only fills the statistics.
    for seed in range(2):
        model(batch(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inside_backward_a_bad_gradient_refuses_its_own_layer(value: float) -> None:
    model = Branches()
    optimizer = build_optimizer(model, ternary={"apply": "backward"})
    step_twice(model, optimizer)
    before = snapshot(model)
    model(batch(2), value).backward()
    with pytest.raises(NonFiniteError, match="gradient of layer 'left', gradient of 'gain' not"):
        optimizer.step()
    assert {name.split(".")[0] for name in changed(model, before)} == {"right"}
    # Until the step told of it, that layer stood still; now it goes on.
    optimizer.zero_grad()
    model(batch(3)).backward()
    assert "left.T_accum" in changed(model, before)
    assert model.left.rng[2] == 3
    assert model.right.rng[2] == 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inside_backward_a_bad_loss_that_is_guarded_refuses_every_layer(value: float) -> None:
    model = Branches()
    optimizer = build_optimizer(model, ternary={"apply": "backward"})
    step_twice(model, optimizer)
    before = snapshot(model)
    # Added to the loss it leaves every gradient finite.
    optimizer.guard_loss(model(batch(2)) + value).backward()
    with pytest.raises(NonFiniteError, match="the loss not finite"):
        optimizer.step()
    assert changed(model, before) == []
    optimizer.zero_grad()
    optimizer.guard_loss(model(batch(2))).backward()
    optimizer.step()
    assert {"left.T_accum", "right.T_accum", "gain"} <= set(changed(model, before))


@pytest.mark.parametrize("mode", ["step", "hooks"])
def test_a_bad_loss_that_is_guarded_refuses_the_step(mode: Apply) -> None:
    model = Branches()
    optimizer = TernaryOptimizer(model, apply=mode)
    before = snapshot(model)
    optimizer.guard_loss(model(batch(2)) + torch.inf).backward()
    with pytest.raises(NonFiniteError, match="nothing was changed: the loss not finite"):
        optimizer.step()
    assert changed(model, before) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_of_one_layer_refuses_all_that_was_kept(value: float) -> None:
    model = Branches()
    optimizer = TernaryOptimizer(model, apply="hooks")
    step_twice(model, optimizer)
    before = snapshot(model)
    for factor in (1.0, value, 1.0):
        model(batch(2), factor).backward()
    with pytest.raises(NonFiniteError, match="nothing was changed: gradient of layer 'left' not finite"):
        optimizer.step()
    assert changed(model, before) == []
    assert all(layer.hooks() == ([], []) for layer in layers_of(model))


@pytest.mark.parametrize("parts", [(4,), (1, 1, 1, 1)])
def test_tokens_whose_gradients_add_up_to_more_than_float32_holds_are_refused(parts: tuple[int, ...]) -> None:
    layer = make_layer(16, 8)
    optimizer = TernaryOptimizer(layer, apply="hooks")
    before = snapshot(layer)
    for tokens in parts:
        (layer(torch.ones(tokens, 16)) * 1e38).sum().backward()
    with pytest.raises(NonFiniteError, match="gradient of layer 0 not finite"):
        optimizer.step()
    assert changed(layer, before) == []
