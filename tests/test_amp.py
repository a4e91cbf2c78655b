"""GradScaler and Accelerate around the optimizers: what torch's own optimizers can be put under."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryOptimizer, build_optimizer
from tests.optim_kit import changed, make_layer, snapshot


class Gained(nn.Module):
    """A ternary layer behind a float parameter, whose own gradient stays finite when that of the layer does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = make_layer(16, 16)
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        loss: Tensor = (self.layer(x) * factor).sum() + (self.gain * x.mean(0)).square().sum()
        return loss


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scaled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, factor: float, *, unscale: bool = False
) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    scaler.scale(model(x, factor)).backward()
    if unscale:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("mode", ["step", "hooks"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_ternary_gradient_that_overflows_lowers_the_scale(alone: bool, mode: Any, unscale: bool) -> None:
    model = Gained()
    # The default of skip_nonfinite: a scaler takes overflow for something that happens.
    optimizer = TernaryOptimizer(model, apply=mode) if alone else build_optimizer(model, ternary={"apply": mode})
    scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=4.0)
    scaled_step(model, optimizer, scaler, 1.0, unscale=unscale)
    before = snapshot(model)
    scaled_step(model, optimizer, scaler, torch.inf, unscale=unscale)
    assert scaler.get_scale() == 2.0
    assert changed(model, before) == []
    scaled_step(model, optimizer, scaler, 1.0, unscale=unscale)
    assert scaler.get_scale() == 2.0
    assert {"layer.T_accum"} | (set() if alone else {"gain"}) <= set(changed(model, before))


def test_what_stands_for_the_ternary_gradients_is_no_gradient_otherwise() -> None:
    model = Gained()
    optimizer = TernaryOptimizer(model)
    (parameter,) = (p for p in optimizer.param_groups[0]["params"] if p.is_floating_point())
    assert parameter.grad.tolist() == [0.0]
    model(torch.full((1, 16), torch.nan)).backward()
    assert parameter.grad.tolist() == [torch.inf]
    twin = copy.deepcopy((model, optimizer))[1]
    optimizer.zero_grad()
    assert parameter.grad.tolist() == [0.0]
    (copied,) = (p for p in twin.param_groups[0]["params"] if p.is_floating_point())
    assert copied.grad.tolist() == [torch.inf]
    assert "0" not in optimizer.state_dict()["state"]


@pytest.mark.parametrize("mode", ["step", "backward", "hooks"])
def test_accelerate_prepares_accumulates_clips_schedules_and_steps(mode: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    first = make_layer(16, 32)
    model = nn.Sequential(first, nn.ReLU(), make_layer(32, 16), nn.LayerNorm(16))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    optimizer = build_optimizer(model, lr=1e-2, ternary={"apply": mode})
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    prepared, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    x = torch.randn(32, 16)
    target, losses = x.flip(1), []
    for _ in range(40):
        with accelerator.accumulate(prepared):
            loss = nn.functional.mse_loss(prepared(x).float(), target)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert float(optimizer.param_groups[-1]["lr"]) == pytest.approx(2 / 254)
    # A step for two micro-batches; an update inside backward for each.
    assert first.rng[2] == (40 if mode == "backward" else 20)
