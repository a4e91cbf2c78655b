"""Copies of an optimizer, by deepcopy or pickle, with the model that it drives."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, TernaryOptimizer, build_optimizer, ternarize
from ternarize.layer import ternary_layers

Pair = tuple[nn.Module, Any]


def through_pickle(pair: Pair) -> Pair:
    copied: Pair = pickle.loads(pickle.dumps(pair))
    return copied


def step(pair: Pair) -> dict[str, Tensor]:
    model, optimizer = pair
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("make", [TernaryOptimizer, build_optimizer])
def test_a_copy_drives_the_copied_model_and_goes_on_as_the_original(
    copy_of: Callable[[Pair], Pair], make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    torch.manual_seed(0)
    config = TernaryConfig(group_size=8)
    model = nn.Sequential(ternarize(nn.Linear(16, 8), config), nn.ReLU(), nn.LayerNorm(8))
    original = (model, make(model))
    step(original)
    twin = copy_of(original)
    before = copy.deepcopy(model.state_dict())
    after = step(twin)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(step(original), after, rtol=0, atol=0)
    assert not torch.equal(after["0.T_accum"], before["0.T_accum"])
    for (_, layer), (_, other) in zip(ternary_layers(model), ternary_layers(twin[0]), strict=True):
        assert torch.equal(layer.rng, other.rng)
