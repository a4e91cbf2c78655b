"""Linear layers that graphs call as functions become ternary layers beside their parameters."""

import copy
import operator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ternarize import TernaryLinear, ternarize
from ternarize.errors import ConversionError
from ternarize.passes.swap_linear import find_linear_calls, otherwise_read
from ternarize.report import TernaryReport


class Functional(nn.Module):
    """One linear layer as a module, and two as functions, of which one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(40, 24)
        self.up = nn.Parameter(torch.randn(32, 24))
        self.shift = nn.Parameter(torch.randn(32))
        self.down = nn.Parameter(torch.randn(24, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        for _ in range(2):
            x = F.linear(torch.relu(F.linear(x, self.up, bias=self.shift)), self.down)
        return x


def ternary_targets(graph_module: fx.GraphModule) -> list[str]:
    modules = dict(graph_module.named_modules())
    called = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    return [target for target in called if isinstance(modules[target], TernaryLinear)]


def linear_functions(graph_module: fx.GraphModule) -> int:
    targets = (F.linear, torch.ops.aten.linear.default)
    return sum(node.op == "call_function" and node.target in targets for node in graph_module.graph.nodes)


def dense_twin(model: Functional, ternary: fx.GraphModule) -> Functional:
    """The model with the weights that the ternary layers hold."""
    twin = copy.deepcopy(model)
    modules = dict(ternary.named_modules())
    for name in ("up", "down"):
        layer = modules[f"{name}_ternary"]
        assert isinstance(layer, TernaryLinear)
        getattr(twin, name).data = layer.weight
    layer = modules["fc"] if isinstance(modules["fc"], TernaryLinear) else modules["fc.weight_ternary"]
    assert isinstance(layer, TernaryLinear)
    twin.fc.weight.data = layer.weight
    return twin


def report_of(model: nn.Module) -> TernaryReport:
    report = model.__dict__["ternary_report"]
    assert isinstance(report, TernaryReport)
    return report


def test_traced_functions_and_modules_become_ternary_with_the_same_numbers() -> None:
    model = Functional()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    ternary = ternarize(traced, group_size=16)
    assert ternary is traced
    assert ternary_targets(traced) == ["fc", "up_ternary", "down_ternary", "up_ternary", "down_ternary"]
    assert linear_functions(traced) == 0
    assert not any(parameter.is_floating_point() for parameter in traced.parameters()), "dense parameters are dropped"
    assert not traced.graph.find_nodes(op="get_attr")
    x = torch.randn(5, 40)
    torch.testing.assert_close(traced(x), dense_twin(model, traced)(x))
    assert [row.name for row in report_of(traced).swapped] == ["fc", "up", "down"]
    assert all(module.name for module in traced.modules() if isinstance(module, TernaryLinear))


def test_exported_program_keeps_metadata_and_its_own_weights() -> None:
    model = Functional()
    program = torch.export.export(
        model, (torch.randn(5, 40),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}}
    )
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    ternary = ternarize(program, group_size=16)
    assert isinstance(ternary, fx.GraphModule)
    assert ternary_targets(ternary) == ["fc.weight_ternary", *["up_ternary", "down_ternary"] * 2]
    assert linear_functions(ternary) == 0
    for node in ternary.graph.nodes:
        if node.op == "call_module" and str(node.target).endswith("_ternary"):
            assert node.meta["val"].shape[1] == (32 if "up" in str(node.target) else 24)
            assert isinstance(node.meta["val"].shape[0], torch.SymInt)
    x = torch.randn(7, 40)
    torch.testing.assert_close(ternary(x), dense_twin(model, ternary)(x))
    assert [row.name for row in report_of(ternary).swapped] == ["fc", "up", "down"]
    assert program.state_dict.keys() == before.keys()
    assert all(torch.equal(tensor, program.state_dict[name]) for name, tensor in before.items())


def test_what_is_excluded_leaves_graph_and_parameters_untouched() -> None:
    traced = fx.symbolic_trace(Functional())
    ternarize(traced, exclude=["up", "fc"])
    assert ternary_targets(traced) == ["down_ternary"] * 2
    assert linear_functions(traced) == 2
    assert {name for name, p in traced.named_parameters() if p.is_floating_point()} == {
        "up",
        "shift",
        "fc.weight",
        "fc.bias",
    }
    assert {row.name: row.reason for row in report_of(traced).skipped} == {
        "up": "excluded by 'up'",
        "fc": "excluded by 'fc'",
    }


def test_graph_without_linear_layers_is_refused_unchanged() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2) @ self.weight

    traced = fx.symbolic_trace(Scale())
    code = traced.code
    assert find_linear_calls(traced) == []
    with pytest.raises(ConversionError, match="has no linear layer"):
        ternarize(traced)
    assert traced.code == code


class Shared(nn.Module):
    """A weight that the graph reads in other ways than as a linear layer's."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.w = nn.Parameter(torch.randn(8, 8))
        self.other = nn.Linear(8, 8)
        self.third = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.other(x), self.w)
        if self.use == "input":
            return F.linear(self.w, self.third) + y
        if self.use == "operand":
            return y @ self.w
        if self.use == "computed bias":
            return F.linear(y, self.w, x.sum(0))
        if self.use == "bias":
            return y + self.other.bias
        if self.use == "bias of another":
            return F.linear(x, self.third, self.other.bias) + y
        return y + F.linear(x, self.other.weight, self.other.bias)


@pytest.mark.parametrize(
    ("use", "reasons"),
    [
        ("operand", {"w": "the graph reads its weight for something else too"}),
        ("input", {"w": "the graph reads its weight for something else too"}),
        ("computed bias", {"w": "its bias is computed in the graph"}),
        ("bias", {"other": "the graph reads its bias for something else too"}),
        ("bias of another", {"other": "the graph reads its bias for something else too"}),
    ],
)
def test_weights_that_the_graph_needs_dense_are_skipped_with_the_reason(use: str, reasons: dict[str, str]) -> None:
    traced = fx.symbolic_trace(Shared(use))
    ternarize(traced)
    assert {row.name: row.reason for row in report_of(traced).skipped} == reasons
    assert report_of(traced).swapped
    assert traced(torch.randn(8, 8)).shape == (8, 8)


def test_module_and_function_of_one_weight_become_one_layer() -> None:
    traced = fx.symbolic_trace(Shared("module"))
    ternarize(traced)
    assert ternary_targets(traced) == ["other", "w_ternary", "other"]
    x = torch.randn(3, 8)
    other, w = traced.get_submodule("other"), traced.get_submodule("w_ternary")
    torch.testing.assert_close(traced(x), w(other(x)) + other(x))


def test_report_survives_a_copy_of_the_graph_module() -> None:
    traced = fx.symbolic_trace(Functional())
    ternarize(traced)
    assert report_of(copy.deepcopy(traced)) == report_of(traced)
    again = ternarize(fx.symbolic_trace(Functional()), inplace=False)
    assert report_of(again).swapped == report_of(traced).swapped


def test_inplace_false_leaves_the_graph_alone() -> None:
    traced = fx.symbolic_trace(Functional())
    code, names = traced.code, [name for name, _ in traced.named_parameters()]
    ternary = ternarize(traced, inplace=False)
    assert ternary is not traced
    assert traced.code == code
    assert [name for name, _ in traced.named_parameters()] == names


def test_graph_module_inside_a_model_is_rewritten_too() -> None:
    model = nn.Sequential(nn.Linear(40, 40), fx.symbolic_trace(Functional()))
    ternarize(model)
    assert [row.name for row in report_of(model).swapped] == ["0", "1.fc", "1.up", "1.down"]
    assert model(torch.randn(2, 40)).shape == (2, 24)


def test_weights_read_as_operands_are_told_from_weights_of_linear_calls() -> None:
    traced = fx.symbolic_trace(Shared("operand"))
    assert otherwise_read(traced) == {"w"}
    assert [(calls.weight, calls.bias, len(calls.nodes)) for calls in find_linear_calls(traced)] == [("w", None, 1)]
    assert operator.matmul in {node.target for node in traced.graph.nodes}
