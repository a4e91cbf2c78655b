from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ternarize import TernaryConfig, freeze
from ternarize.layer import TernaryLinear
from ternarize.passes.fuse_shared_input import FuseSharedInputPass

MakeLayer = Callable[..., TernaryLinear]
Graphs = list[Counter[str]]


def test_numbers_equal_eager(block: nn.Module, assert_trains_equal: Callable[..., None]) -> None:
    assert_trains_equal(block, torch.randn(2, 5, 32))


def test_seven_layers_are_four_calls_forward_and_backward(
    block: nn.Module, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs, lowered_graphs: Graphs
) -> None:
    compile_fresh(block)(torch.randn(2, 5, 32, requires_grad=True)).sum().backward()
    assert dynamo_graphs == [Counter(linear_train=4)]
    forward, backward = lowered_graphs
    assert forward == Counter(linear_torch=4)
    assert backward == Counter(grad_input_torch=4, update_stage_torch=4)


class TwoLayers(nn.Module):
    """Layers a and b on one x, with something done in between."""

    def __init__(self, a: nn.Module, b: nn.Module, between: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.between = a, b, between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first = self.a(x)
        self.between(x)
        return torch.cat([first, self.b(x)], -1)


def test_layers_stay_apart_where_the_input_is_written_between(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    for between in (lambda x: x.add_(1), lambda x: x.__setitem__(0, 1.0), lambda x: torch.relu_(x)):
        model = TwoLayers(make_layer(32, 8), make_layer(32, 8), between).eval()
        x = torch.randn(3, 32)
        with torch.no_grad():
            torch.testing.assert_close(compile_fresh(model)(x), model(x))
        assert dynamo_graphs.pop() == Counter(linear=2)


@pytest.mark.parametrize("other", [{"planes": 2}, {"mantissa": True}], ids=str)
def test_layers_of_different_kinds_stay_apart(
    other: dict[str, Any], make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    def nothing(_: Tensor) -> None:
        pass

    model = TwoLayers(make_layer(32, 8), frozen_layer(32, 8, **other), nothing).eval()
    freeze(model)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compile_fresh(model)(x), model(x))
    assert dynamo_graphs.pop() == Counter(linear=2)


def frozen_layer(in_features: int, out_features: int, *, planes: int = 1, mantissa: bool = False) -> TernaryLinear:
    config = TernaryConfig(planes=planes, group_size=16)  # type: ignore[arg-type]  # 1 or 2
    levels = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    E = torch.zeros(out_features, in_features // 16, dtype=torch.int8)
    E_mantissa = torch.full_like(E, 3, dtype=torch.uint8) if mantissa else None
    return TernaryLinear.from_levels(levels, E, config=config, E_mantissa=E_mantissa)


class CastTwice(nn.Module):
    """Layers a and b on casts of one x, which is written between the casts."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        before = x.to(torch.bfloat16)
        x.add_(1)
        after = x.to(torch.bfloat16)
        return torch.cat([self.a(before), self.b(after)], -1)


def test_casts_of_an_input_that_is_written_between_them_differ(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any]
) -> None:
    model = CastTwice(make_layer(32, 8), make_layer(32, 8))
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compile_fresh(model)(x), model(x))


class Checkpointed(nn.Module):
    """Recomputes its module in backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.module, x, use_reentrant=False)
        return y


def test_layers_are_merged_where_activations_are_checkpointed(
    block: nn.Module, assert_trains_equal: Callable[..., None], lowered_graphs: Graphs
) -> None:
    assert_trains_equal(Checkpointed(block), torch.randn(2, 5, 32))
    assert [graph["update_stage_torch"] for graph in lowered_graphs] == [0, 4]


def test_layers_with_different_groups_stay_apart(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    model = TwoLayers(make_layer(64, 8), make_layer(64, 8, group_size=16), lambda x: None)
    compile_fresh(model)(torch.randn(3, 64))
    assert dynamo_graphs == [Counter(linear_train=2)]


def test_layers_under_autocast_are_merged(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    model = TwoLayers(make_layer(32, 8), make_layer(32, 8), lambda x: None)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = compile_fresh(model)(x)
        torch.testing.assert_close(compiled, model(x))
    assert dynamo_graphs == [Counter(linear_train=1)]
    assert compiled.dtype == torch.bfloat16


def test_a_dense_graph_stays_as_it_is() -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).graph
    before = str(graph)
    assert FuseSharedInputPass()(graph) == 0
    assert str(graph) == before
