"""What is not finite changes no bit, in compiled graphs: the twin of test_update_guard.py."""

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, TernaryLinear, build_optimizer
from ternarize.config import Rule
from ternarize.errors import NonFiniteError

#: Where something is put in: positions in the tensor that `Poisoned` takes.
PLACES = ("loss", "activation", "gradient")


class AddToGradient(torch.autograd.Function):
    """A copy, whose gradient has one entry changed by an amount."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, amount: Tensor) -> Tensor:
        ctx.save_for_backward(amount)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (amount,) = ctx.saved_tensors
        return gradients[0] + torch.nn.functional.pad(amount.reshape(1, 1), (3, 4, 2, 5)), None


class Poisoned(nn.Module):
    """Two layers on one x, a float parameter, and a loss; amounts of 0 change nothing."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        config = TernaryConfig(group_size=8, rule=rule, train_exponents=True)

        def layer() -> TernaryLinear:
            levels = torch.randint(-1, 2, (8, 8), dtype=torch.int8)
            E = torch.full((8, 1), -2, dtype=torch.int8)
            return TernaryLinear.from_levels(levels, E, config=config, trainable=True)

        self.gain = nn.Parameter(torch.ones(8))
        self.trunk, self.left, self.right = layer(), layer(), layer()

    def forward(self, x: Tensor, amounts: Tensor) -> Tensor:
        of_loss, of_activation, of_gradient = amounts.unbind()
        h = torch.relu(self.trunk(x * self.gain) + of_activation)
        y = AddToGradient.apply(self.left(h), of_gradient) * self.right(h)  # type: ignore[no-untyped-call]  # of torch
        loss: Tensor = (y - x).square().mean() + of_loss
        return loss


class Run:
    """A compiled model with its optimizer, whose every step moves trits."""

    def __init__(self, rule: Rule) -> None:
        torch.manual_seed(0)
        self.model = Poisoned(rule)
        self.compiled: Any = torch.compile(self.model, backend="ternary", fullgraph=True)
        ternary = {"lr": 1.0, "threshold": 1, "exponent_threshold": 1}
        self.optimizer = build_optimizer(self.model, torch.optim.AdamW, lr=1e-2, ternary=ternary)

    def step(self, seed: int, place: str = "", amount: float = 0.0) -> Tensor:
        amounts = torch.tensor([amount if place == name else 0.0 for name in PLACES])
        loss: Tensor = self.compiled(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)), amounts)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def states(self) -> tuple[Any, Any]:
        """Copies of all that a step may change, with the count of refused steps at 0."""
        model, optimizer = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        for entry in optimizer["state"].values():
            if "skipped_steps" in entry:
                entry["skipped_steps"] = torch.zeros((), dtype=torch.int64)
        return model, optimizer

    def load(self, states: tuple[Any, Any]) -> None:
        model, optimizer = copy.deepcopy(states)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


@pytest.fixture(scope="module", params=get_args(Rule))
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    torch._dynamo.reset()
    yield Run(request.param)
    torch._dynamo.reset()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_changes_and_the_next_step_is_as_if_it_had_not_been(run: Run, place: str, value: float) -> None:
    run.step(0)
    run.step(1)
    before = run.states()
    with pytest.raises(NonFiniteError, match="nothing was changed"):
        run.step(2, place, value)
    torch.testing.assert_close(run.states(), before, rtol=0, atol=0)

    # Of the float parameter only: the refused step has emptied the stages itself.
    run.model.gain.grad = None
    run.step(3)
    went_on = run.states()
    assert any(not torch.equal(went_on[0][name], T) for name, T in before[0].items() if name.endswith("T_packed"))
    run.load(before)
    run.step(3)
    torch.testing.assert_close(run.states(), went_on, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_is_named_where_every_gradient_is(run: Run) -> None:
    with pytest.raises(NonFiniteError, match="nothing was changed: the loss not finite"):
        run.step(0, "loss", torch.inf)
    run.optimizer.zero_grad()
