"""The modes "backward" and "hooks" in compiled graphs: equal to eager, one graph for every learning rate."""

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.utils.checkpoint import checkpoint

from ternarize import TernaryConfig, TernaryLinear, TernaryOptimizer, build_optimizer
from ternarize.config import Rule
from ternarize.errors import NonFiniteError
from ternarize.layer import Apply, ternary_layers
from tests.optim_kit import changed, snapshot

every_mode = pytest.mark.parametrize("mode", get_args(Apply))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Integers(nn.Module):
    """Two layers that share x, and one after them. On small integers every sum is exact, in any order."""

    def __init__(self, rule: Rule = "factored", *, recompute: bool = False) -> None:
        super().__init__()
        config = TernaryConfig(group_size=8, rule=rule, train_exponents=True)

        def layer() -> TernaryLinear:
            levels = torch.randint(-1, 2, (8, 8), dtype=torch.int8)
            E = torch.zeros(8, 1, dtype=torch.int8)
            return TernaryLinear.from_levels(levels, E, config=config, trainable=True)

        self.left, self.right, self.last = layer(), layer(), layer()
        self.recompute = recompute

    def block(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.relu(self.left(x)) - torch.relu(self.right(x)))
        return y

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return (y * x).sum() + shift


def batch(seed: int) -> Tensor:
    return torch.randint(-2, 3, (5, 8), generator=torch.Generator().manual_seed(seed)).float()


ZERO = torch.tensor(0.0)


@every_mode
def test_a_cuda_graph_would_copy_nothing_but_the_inputs(mode: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_part: Any = compile_fx.compile_fx_inner
    parts: list[tuple[int, int]] = []

    def spy(graph: fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
        part = compile_part(graph, inputs, **settings)
        static = set(settings["static_input_idxs"])
        # Graphs that write to what has no address of its own are not recorded at all.
        assert set(part.mutated_input_idxs) <= static
        parts.append((len(static), len(inputs)))
        return part

    monkeypatch.setattr(compile_fx, "compile_fx_inner", spy)
    model = Integers()
    optimizer = TernaryOptimizer(model, apply=mode)
    compiled: Any = torch.compile(model, backend="ternary", fullgraph=True)
    # What comes from a cache is not compiled.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled(batch(0), ZERO).backward()
    optimizer.step()
    # x and the shift of forward; backward starts from the gradient of its result.
    (forward_static, forward_inputs), (backward_static, backward_inputs) = parts
    assert forward_inputs - forward_static == 2
    assert backward_inputs - backward_static == 1


@every_mode
@pytest.mark.parametrize(("rule", "recompute"), [("factored", False), ("sign", False), ("factored", True)])
def test_compiled_training_equals_eager(mode: Apply, rule: Rule, recompute: bool) -> None:
    model = Integers(rule, recompute=recompute)
    before, twin = snapshot(model), copy.deepcopy(model)
    compiled: Any = torch.compile(twin, backend="ternary", fullgraph=True)
    # Exponents stand still, so that sums stay exact.
    options: dict[str, Any] = {"lr": 1.0, "threshold": 1, "exponent_threshold": 127, "apply": mode}
    optimizers = [TernaryOptimizer(each, **options) for each in (model, twin)]
    for seed in range(4):
        for run, optimizer in zip((model, compiled), optimizers, strict=True):
            for part in range(2):
                run(batch(2 * seed + part), ZERO).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert changed(twin, model.state_dict()) == []
    assert {"left.T_packed", "right.T_packed", "last.T_packed"} <= set(changed(model, before))
    for (_, layer), (_, other) in zip(ternary_layers(model), ternary_layers(twin), strict=True):
        assert torch.equal(layer.rng, other.rng)
        assert other.hooks() == ([], [])


def test_a_new_learning_rate_compiles_nothing() -> None:
    model = Integers("sign")
    compiled: Any = torch.compile(model, backend="ternary", fullgraph=True)
    optimizer = TernaryOptimizer(model, lr=8.0, threshold=127, apply="backward")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    counters.clear()
    moves = []
    for _ in range(3):
        before = snapshot(model)
        compiled(batch(0), ZERO).backward()
        optimizer.step()
        schedule.step()
        moves.append((model.state_dict()["last.T_accum"] - before["last.T_accum"]).abs().max().item())
    assert moves == [8, 4, 2]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inside_a_compiled_backward_a_bad_loss_refuses_every_layer(value: float) -> None:
    model = Integers()
    compiled: Any = torch.compile(model, backend="ternary", fullgraph=True)
    optimizer = build_optimizer(model, ternary={"apply": "backward"})
    for seed in range(2):
        compiled(batch(seed), ZERO).backward()
        optimizer.step()
    before = snapshot(model)
    # The gradient is that of a finite loss.
    compiled(batch(2), torch.tensor(value)).backward()
    assert changed(model, before) == []
    with pytest.raises(NonFiniteError, match="the loss not finite"):
        optimizer.step()
    compiled(batch(2), ZERO).backward()
    optimizer.step()
    assert {"left.T_accum", "right.T_accum", "last.T_accum"} <= set(changed(model, before))


def test_two_forwards_before_two_backwards_are_an_error_inside_backward() -> None:
    model = Integers()
    compiled: Any = torch.compile(model, backend="ternary", fullgraph=True)
    TernaryOptimizer(model, apply="backward")
    first, second = compiled(batch(0), ZERO), compiled(batch(1), ZERO)
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
