import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize.layer import TernaryLinear, ternary_layers

MakeLayer = Callable[..., TernaryLinear]
Graphs = list[Counter[str]]


class Tied(nn.Module):
    """One layer, used twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.relu(self.layer(x)))
        return y


def test_numbers_equal_eager_with_two_forwards_before_two_backwards(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any]
) -> None:
    model = Tied(make_layer(32, 32))
    twin = copy.deepcopy(model)
    compiled = compile_fresh(twin)
    batches = torch.randn(2, 3, 32)
    for run in (model, compiled):
        first, second = run(batches[0]), run(batches[1])
        first.square().sum().backward()
        second.square().sum().backward()
    ((_, eager),) = ternary_layers(model)
    ((_, other),) = ternary_layers(twin)
    assert eager.stage is not None
    assert other.stage is not None
    assert eager.status.tolist() == other.status.tolist() == [0, 4]
    assert torch.equal(eager.stage, other.stage)


def test_every_layer_has_one_hook_in_backward(
    block: nn.Module, compile_fresh: Callable[..., Any], lowered_graphs: Graphs
) -> None:
    compile_fresh(block)(torch.randn(2, 5, 32)).sum().backward()
    assert [graph["update_stage_torch"] for graph in lowered_graphs] == [0, 4]


def test_a_commit_between_forward_and_backward_is_an_error(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any]
) -> None:
    layer = make_layer(32, 8)
    output = compile_fresh(layer)(torch.randn(3, 32))
    with torch.no_grad():
        layer.T_packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_frozen_layers_get_no_hook(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], lowered_graphs: Graphs
) -> None:
    layer = make_layer(32, 8)
    layer.freeze()
    compile_fresh(layer)(torch.randn(3, 32, requires_grad=True)).sum().backward()
    assert lowered_graphs == [Counter(linear_torch=1), Counter(grad_input_torch=1)]


class Detached(nn.Module):
    """Three layers, of which only the first gets a gradient; the others may share its input."""

    def __init__(self, layers: list[TernaryLinear], shift: float) -> None:
        super().__init__()
        self.trained, self.detached, self.unused = layers
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.shift if self.shift else x
        self.unused(h)
        y: Tensor = self.trained(x) * self.detached(h).detach()
        return y


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["merged", "apart"])
def test_layers_without_a_gradient_stay_as_they_are(
    make_layer: MakeLayer, assert_trains_equal: Callable[..., None], shift: float
) -> None:
    model = Detached([make_layer(32, 8) for _ in range(3)], shift)
    assert_trains_equal(model, torch.randn(3, 32))
    assert [layer.status.tolist() for _, layer in ternary_layers(model)] == [[0, 1], [0, 0], [0, 0]]
