"""How Inductor reduces rows in graphs of int8 activations, and in which graphs it does so."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx, config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code
from torch._inductor.virtualized import V

from ternarize import TernaryConfig, ternarize
from ternarize.backends.row_reductions import RowReductions
from ternarize.config import Activation

CPU = torch.device("cpu")


@pytest.mark.parametrize("numel", [16384, 16385], ids=str)
@pytest.mark.parametrize("hint", [ReductionHint.INNER, ReductionHint.OUTER], ids=str)
def test_rows_of_up_to_16384_values_are_kept_in_registers(
    numel: int, hint: ReductionHint, monkeypatch: pytest.MonkeyPatch
) -> None:
    features: Any = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=numel)
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: "Inductor's"))
    graph: Any = SimpleNamespace(sizevars=SizeVarAllocator())
    with V.set_graph_handler(graph):
        kept: Any = RowReductions.should_use_persistent_reduction(features, cooperative_reduction=False)
        with config.patch({"triton.persistent_reductions": False}):
            refused: Any = RowReductions.should_use_persistent_reduction(features, cooperative_reduction=False)
    assert kept == (True if hint == ReductionHint.INNER and numel <= 16384 else "Inductor's")
    assert refused == "Inductor's"


def test_rows_of_up_to_32768_values_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InductorChoices, "reduction_split_factor", staticmethod(lambda *_: 7))
    split = RowReductions.reduction_split_factor
    assert [split(CPU, 32768, 1, True), split(CPU, 32769, 1, True), split(CPU, 4096, 1, False)] == [1, 7, 7]


@pytest.mark.parametrize(
    ("activation", "training", "expected"),
    [("int8", False, RowReductions), ("float", False, InductorChoices), ("int8", True, InductorChoices)],
)
def test_inference_graphs_of_int8_activations_are_compiled_so(
    activation: Activation, training: bool, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, choices = compile_fx.compile_fx_inner, []

    def compile_fx_inner(*args: Any, **settings: Any) -> Any:
        choices.append(type(V.choices))
        return inner(*args, **settings)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_fx_inner)
    torch._dynamo.reset()
    model = ternarize(nn.Linear(128, 16), TernaryConfig(activation=activation))
    x = torch.randn(3, 128, requires_grad=training)
    # From a cache, nothing would be compiled.
    with torch.set_grad_enabled(training), fresh_inductor_cache():
        torch.compile(model, backend="ternary")(x)
    assert choices
    assert set(choices) == {expected}
    assert type(V.choices) is InductorChoices


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("K", [14336, 28672])
def test_what_comes_before_a_call_rounds_x_in_the_same_kernel(K: int, dynamic: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(K, 256)

        def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(nn.functional.silu(gate) * up)
            return y

    torch._dynamo.reset()
    model = ternarize(Gated().cuda().bfloat16(), TernaryConfig(activation="int8"))
    compiled = torch.compile(model, backend="ternary", dynamic=dynamic)
    for M in (200, 300):
        gate, up = torch.randn(2, M, K, dtype=torch.bfloat16, device="cuda")
        with torch.inference_mode():
            y, (code,) = run_and_get_code(compiled, gate, up)
            torch.testing.assert_close(y, model(gate, up), rtol=2e-2, atol=2e-2)
        kernels = re.findall(r"triton_\w+\.run\(", code)
        assert len(kernels) == 1, kernels
        assert kernels[0].startswith("triton_per" if K <= 16384 else "triton_red")
        if dynamic:
            break
