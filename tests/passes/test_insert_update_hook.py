import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ternarize.errors import TernarizeError
from ternarize.layer import TernaryLinear, ternary_layers
from ternarize.passes.insert_update_hook import InsertUpdateHookPass

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


def test_a_lost_hook_is_an_error(make_layer: MakeLayer) -> None:
    layer = make_layer(32, 8)
    graph = fx.Graph()
    x, *state = (graph.placeholder(name) for name in ("x", "anchor", "T", "E", "stage", "status"))
    weights = ([state[1]], [state[2]], [None], [None], [None])
    staged: tuple[list[Any], ...] = ([], [], [], [state[3]], [], [], [], [state[4]])
    call = torch.ops.ternarize.linear_train.default
    graph.output(graph.call_function(call, (x, state[0], *weights, *staged, layer.group_size, layer.rule)))
    with pytest.raises(TernarizeError, match="1 ternary layers and 0 update hooks"):
        InsertUpdateHookPass()(graph)
