"""What the tests of the optimizers share: layers of every form, and steps under known gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

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
