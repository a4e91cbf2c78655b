import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ternarize import guard
from ternarize.backends import select
from ternarize.backends.tilelang import linear as tilelang_linear
from ternarize.backends.torch import linear as torch_linear
from ternarize.backends.torch.update import NONFINITE_LOSS
from ternarize.errors import NonFiniteError
from ternarize.layer import TernaryLinear, ternary_layers

MakeLayer = Callable[..., TernaryLinear]
Graphs = list[Counter[str]]


class WithLoss(nn.Module):
    """Returns its loss and its output, as language models do; the loss may be shifted without changing gradients."""

    def __init__(self, layer: TernaryLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y.square().mean() + shift, y


def test_loss_numbers_equal_eager(make_layer: MakeLayer, compile_fresh: Callable[..., Any]) -> None:
    model = WithLoss(make_layer(32, 8))
    x = torch.randn(3, 32)
    torch.testing.assert_close(compile_fresh(model)(x, torch.tensor(1.0)), model(x, torch.tensor(1.0)))


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_a_loss_that_is_not_finite_is_flagged_in_backward(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], shift: float
) -> None:
    layer = make_layer(32, 8)
    loss, _ = compile_fresh(WithLoss(layer))(torch.randn(3, 32), torch.tensor(shift))
    assert layer.status.tolist() == [0, 0]
    loss.backward()
    assert layer.status.tolist() == [0 if shift == 0.0 else NONFINITE_LOSS, 1]


def test_one_guard_for_the_loss_and_none_without_one(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], dynamo_graphs: Graphs
) -> None:
    model = WithLoss(make_layer(32, 8))
    compile_fresh(model)(torch.randn(3, 32), torch.tensor(0.0))
    assert dynamo_graphs.pop() == Counter(linear_train=1, guard_loss=1)
    compile_fresh(model.layer)(torch.randn(3, 32))
    assert dynamo_graphs.pop() == Counter(linear_train=1)
    model.layer.freeze()
    compile_fresh(model)(torch.randn(3, 32, requires_grad=True), torch.tensor(0.0))
    assert dynamo_graphs.pop() == Counter(linear=1)


def test_a_loss_behind_checkpointed_layers_is_guarded_and_they_are_explained(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any]
) -> None:
    layer = make_layer(32, 8)

    def loss_of(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(layer, x, use_reentrant=False)
        return y.square().mean() + torch.nan

    compile_fresh(loss_of)(torch.randn(3, 32)).backward()
    assert layer.status.tolist() == [NONFINITE_LOSS, 1]
    assert layer.choices["training"][0] == "torch"


class FakeTileLang:
    """Stands in for TileLang on a machine without a GPU: the reference, which writes Inf when told to."""

    broken = False
    calls = 0

    def __call__(self, *args: Any) -> list[Tensor]:
        self.calls += 1
        outputs = torch_linear.linear(*args)
        return [torch.full_like(y, float("inf")) for y in outputs] if self.broken else outputs


@pytest.fixture
def fake_tilelang(monkeypatch: pytest.MonkeyPatch) -> FakeTileLang:
    fake = FakeTileLang()
    original = select.choose

    def choose(stem: str, phase: Any, facts: Any, policy: Any, *, tilelang: bool = True) -> select.Choice:
        if stem == "linear" and phase == "inference" and tilelang and policy in ("auto", "tilelang"):
            return select.Choice("tilelang", "a stand-in")
        return original(stem, phase, facts, "auto", tilelang=tilelang)

    monkeypatch.setattr("ternarize.passes.lower_ternary.choose", choose)
    monkeypatch.setattr(tilelang_linear, "linear", fake)
    return fake


def test_output_of_a_sound_kernel_passes_and_is_guarded_once_a_layer(
    block: nn.Module, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang, lowered_graphs: Graphs
) -> None:
    x = torch.randn(2, 5, 32)
    compiled = compile_fresh(block)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    assert lowered_graphs == [Counter(linear_tilelang=4, check_finite=7)]
    assert fake_tilelang.calls == 4


def test_a_kernel_that_writes_inf_is_replaced_and_the_call_is_run_again(
    block: Any, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    x = torch.randn(2, 5, 32)
    compiled = compile_fresh(block)
    block.q.name = "blocks.0.q"
    with torch.no_grad():
        compiled(x)
        fake_tilelang.broken = True
        with pytest.warns(RuntimeWarning, match=r"TileLang wrote NaN or Inf .* in blocks\.0\.q \[32x32\]"):
            first = compiled(x)
        torch.testing.assert_close(first, block(x))
        # Layers behind it had non-finite input then; now their kernels are found out as well, until none is left.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TileLang wrote NaN or Inf", RuntimeWarning)
            for _ in range(5):
                torch.testing.assert_close(compiled(x), block(x))
    assert not any(layer.tilelang for _, layer in ternary_layers(block))


def test_non_finite_input_is_not_the_kernels_fault(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    layer = make_layer(32, 8)
    with torch.no_grad():
        assert compile_fresh(layer)(torch.full((3, 32), float("nan"))).isnan().all()
    assert layer.tilelang


def test_a_forced_kernel_that_writes_inf_raises(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    layer = make_layer(32, 8)
    fake_tilelang.broken = True
    with torch.no_grad(), pytest.raises(NonFiniteError, match="use kernels=auto"):
        compile_fresh(layer, options={"kernels": "tilelang"})(torch.randn(3, 32))


def test_the_guard_can_be_switched_off(
    make_layer: MakeLayer,
    compile_fresh: Callable[..., Any],
    fake_tilelang: FakeTileLang,
    lowered_graphs: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERNARIZE_CHECK_FINITE", "0")
    fake_tilelang.broken = True
    with torch.no_grad():
        assert compile_fresh(make_layer(32, 8))(torch.randn(3, 32)).isinf().all()
    assert lowered_graphs == [Counter(linear_tilelang=1)]


def test_graphs_that_write_to_their_inputs_are_not_run_twice(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    layer = make_layer(32, 8)

    def step(cache: Tensor, x: Tensor) -> Tensor:
        cache.add_(1)
        y: Tensor = layer(x)
        return y

    cache = torch.zeros(2)
    compiled = compile_fresh(step)
    with torch.no_grad():
        compiled(cache, torch.randn(3, 32))
        fake_tilelang.broken = True
        with pytest.warns(RuntimeWarning, match="TileLang wrote NaN or Inf"):
            compiled(cache, torch.randn(3, 32))
    assert cache.tolist() == [2.0, 2.0]
    assert not layer.tilelang


def test_a_status_tensor_leads_to_its_layer_also_after_a_copy(make_layer: MakeLayer) -> None:
    layer = make_layer(32, 8)
    twin = copy.deepcopy(layer)
    assert guard.layer_of(layer.status) is layer
    assert guard.layer_of(twin.status) is twin
