from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from ternarize import TernaryOptimizer
from ternarize.backends.select import Choice, Facts, Phase, choose
from ternarize.config import Kernels
from ternarize.errors import KernelError, TernarizeError
from ternarize.layer import Apply, TernaryLinear
from ternarize.passes import lower_ternary
from ternarize.passes.lower_ternary import LowerTernaryPass

MakeLayer = Callable[..., TernaryLinear]
Graphs = list[Counter[str]]


def test_numbers_equal_eager(block: nn.Module, compile_fresh: Callable[..., Any]) -> None:
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(compile_fresh(block)(x), block(x))


def test_no_semantic_op_is_left(block: nn.Module, compile_fresh: Callable[..., Any], lowered_graphs: Graphs) -> None:
    compiled = compile_fresh(block, options={"kernels": "torch"})
    with torch.no_grad():
        compiled(torch.randn(2, 5, 32))
    compiled(torch.randn(2, 5, 32)).sum().backward()
    inference, forward, backward = lowered_graphs
    assert inference == forward == Counter(linear_torch=4)
    assert backward == Counter(grad_input_torch=4, update_stage_torch=4)


def test_triton_is_used_where_it_is_forced(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], lowered_graphs: Graphs
) -> None:
    layer = make_layer(32, 16)
    x, y = (torch.ones(3, 32, requires_grad=True) for _ in range(2))
    compiled, eager = compile_fresh(layer, options={"kernels": "triton"})(x), layer(y)
    torch.testing.assert_close(compiled, eager)
    compiled.sum().backward()
    eager.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert lowered_graphs == [Counter(linear_triton=1), Counter(grad_input_triton=1, update_stage_triton=1)]


@pytest.mark.parametrize("apply", ["step", "backward"])
@pytest.mark.parametrize("train_exponents", [False, True])
def test_the_choice_of_an_update_knows_whether_exponents_train(
    make_layer: MakeLayer,
    compile_fresh: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    apply: Apply,
    train_exponents: bool,
) -> None:
    seen: dict[str, Facts] = {}

    def record(stem: str, phase: Phase, facts: Facts, policy: Kernels, **rest: bool) -> Choice:
        seen[stem] = facts
        return choose(stem, phase, facts, policy, **rest)

    monkeypatch.setattr("ternarize.passes.lower_ternary.choose", record)
    layer = make_layer(32, 16, train_exponents=train_exponents)
    TernaryOptimizer(layer, apply=apply)
    compile_fresh(layer)(torch.ones(3, 32)).sum().backward()
    facts = seen["update_stage" if apply == "step" else "update_apply"]
    assert (facts.rule, facts.trains_exponents) == ("factored", train_exponents)
    assert (facts.in_features, facts.out_features) == (32, (16,))


def test_tilelang_forced_in_training_says_what_to_do(make_layer: MakeLayer, compile_fresh: Callable[..., Any]) -> None:
    with pytest.raises(BackendCompilerFailed, match="set TERNARIZE_TILELANG_TRAINING=1") as error:
        compile_fresh(make_layer(32, 8), options={"kernels": "tilelang"})(torch.randn(3, 32))
    assert isinstance(error.value.inner_exception, KernelError)


def test_a_dense_graph_stays_as_it_is(compile_fresh: Callable[..., Any], lowered_graphs: Graphs) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(2, 8)
    torch.testing.assert_close(compile_fresh(model)(x), model(x))
    assert lowered_graphs == [Counter()]
    graph = fx.symbolic_trace(model).graph
    before = str(graph)
    assert LowerTernaryPass("inference", "auto")(graph) == 0
    assert str(graph) == before


def test_an_op_that_cannot_be_lowered_is_an_error(monkeypatch: pytest.MonkeyPatch, make_layer: MakeLayer) -> None:
    graph = fx.Graph()
    op = torch.ops.ternarize.linear.default
    graph.output(graph.call_function(op, (graph.placeholder("x"), [], [], [], [], [], [], 32, "float", True)))
    monkeypatch.setattr("ternarize.passes.lower_ternary.LOWERED", ())
    with pytest.raises(TernarizeError, match="were not lowered"):
        LowerTernaryPass("inference", "torch")(graph)


class Gated(nn.Module):
    """A norm, then layers that share its output and must share its quantiser, then one on their product."""

    def __init__(self, make_layer: MakeLayer, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up = make_layer(32, 48, **options), make_layer(32, 48, **options)
        self.down = make_layer(48, 32, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return y


def test_int8_numbers_equal_eager(make_layer: MakeLayer, compile_fresh: Callable[..., Any]) -> None:
    model = Gated(make_layer, activation="int8")
    compiled = compile_fresh(model, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 7):
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x), model(x))


def test_int8_trains_as_eager_does(make_layer: MakeLayer, assert_trains_equal: Callable[..., None]) -> None:
    assert_trains_equal(Gated(make_layer, activation="int8"), torch.randn(5, 32))


def test_int8_is_the_quantiser_once_a_shared_input_and_an_op(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], lowered_graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised = []
    original = lower_ternary._write_quantizer

    def record(graph: fx.Graph, x: fx.Node) -> tuple[Any, Any]:
        quantised.append(x)
        return original(graph, x)

    monkeypatch.setattr(lower_ternary, "_write_quantizer", record)
    with torch.no_grad():
        compile_fresh(Gated(make_layer, activation="int8"))(torch.randn(5, 32))
    assert lowered_graphs == [Counter(linear_int8_torch=2)]
    assert len(quantised) == 2


def test_layers_of_different_activations_stay_apart(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], lowered_graphs: Graphs
) -> None:
    model = Gated(make_layer)
    model.up = make_layer(32, 48, activation="int8")
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(compile_fresh(model)(x), model(x))
    assert lowered_graphs == [Counter(linear_torch=2, linear_int8_torch=1)]
