"""A small transformer of ternary layers, and the graphs that the backend makes of it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, fx, nn

from ternarize.backends import select
from ternarize.config import TernaryConfig
from ternarize.layer import TernaryLinear, ternary_layers
from ternarize.passes import manager

Graphs = list[Counter[str]]


def ternary_layer(in_features: int, out_features: int, **options: Any) -> TernaryLinear:
    """A trainable layer with random trits and exponents, ready for backward."""
    config = TernaryConfig(**{"group_size": 32, **options})
    levels = torch.randint(-1, 2, (out_features, in_features), dtype=torch.int8)
    groups = -(-in_features // config.group_size)
    E = torch.randint(-5, -2, (out_features, groups), dtype=torch.int8)
    layer = TernaryLinear.from_levels(levels, E, config=config, trainable=True)
    layer.prepare_training()
    return layer


class Block(nn.Module):
    """Attention and a gated MLP: one group of three layers that share x, one of two, and two that share with none."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (ternary_layer(width, width) for _ in range(4))
        self.gate, self.up, self.down = (
            ternary_layer(width, 2 * width),
            ternary_layer(width, 2 * width),
            ternary_layer(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.o(torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h))
        h = self.norm(x)
        y: Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return y


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def make_layer() -> Callable[..., TernaryLinear]:
    torch.manual_seed(0)
    return ternary_layer


@pytest.fixture
def compile_fresh() -> Iterator[Callable[..., Any]]:
    """torch.compile with the ternary backend, in an empty Dynamo and without Inductor's caches, so that passes run."""
    torch._dynamo.reset()
    inductor, autograd = torch._inductor.config, torch._functorch.config
    with inductor.patch(fx_graph_cache=False), autograd.patch(enable_autograd_cache=False):
        yield lambda model, **options: torch.compile(model, backend="ternary", fullgraph=True, **options)
    torch._dynamo.reset()


def count_ops(graph: fx.Graph) -> Counter[str]:
    """Calls of our ops in a graph, by name; hooks inside auto_functionalized_v2 included."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        functionalised = node.target is torch.ops.higher_order.auto_functionalized_v2
        name = str(node.args[0] if functionalised else node.target)
        if name.startswith("ternarize."):
            counts[name.removeprefix("ternarize.").removesuffix(".default")] += 1
    return counts


@pytest.fixture
def dynamo_graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Op counts of each Dynamo graph after our passes."""
    seen: Graphs = []
    original = manager.run_on_dynamo_graph

    def record(graph_module: fx.GraphModule) -> None:
        original(graph_module)
        seen.append(count_ops(graph_module.graph))

    monkeypatch.setattr("ternarize.backends.compiler.run_on_dynamo_graph", record)
    return seen


@pytest.fixture
def lowered_graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Op counts of each inference, forward or backward graph after lowering, in the order of compilation."""
    seen: Graphs = []
    original = manager.PostGradPasses.__call__

    def record(self: manager.PostGradPasses, graph: fx.Graph) -> None:
        original(self, graph)
        seen.append(count_ops(graph))

    monkeypatch.setattr(manager.PostGradPasses, "__call__", record)
    return seen


@pytest.fixture
def tilelang_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of ``linear`` in inference graphs are lowered to TileLang, also without a GPU: tests put a kernel there."""
    original = select.choose

    def choose(stem: str, phase: Any, facts: Any, policy: Any, *, tilelang: bool = True) -> select.Choice:
        if stem == "linear" and phase == "inference" and tilelang and policy in ("auto", "tilelang"):
            return select.Choice("tilelang", "a stand-in")
        return original(stem, phase, facts, "auto", tilelang=tilelang)

    monkeypatch.setattr("ternarize.passes.lower_ternary.choose", choose)
    monkeypatch.setattr("ternarize.backends.select.choose", choose)
    monkeypatch.setattr("ternarize.backends.tilelang.programs.prepare", lambda *_, **__: None)


@pytest.fixture
def assert_trains_equal(compile_fresh: Callable[..., Any]) -> Callable[[nn.Module, Tensor], None]:
    """Check output, input gradient and staged integers of a compiled model against the same model run eagerly."""

    def check(model: nn.Module, x: Tensor) -> None:
        twin = copy.deepcopy(model)
        compiled = compile_fresh(twin)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [model(inputs[0]), compiled(inputs[1])]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for (name, eager), (_, other) in zip(ternary_layers(model), ternary_layers(twin), strict=True):
            assert torch.equal(eager.status, other.status), name
            for stage in ("stage", "stage_E", "stage_row", "stage_col"):
                a, b = getattr(eager, stage), getattr(other, stage)
                if a is not None:
                    torch.testing.assert_close(b, a, msg=f"{name}.{stage}")

    return check
