import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from torch.utils.checkpoint import checkpoint

from ternarize import guard
from ternarize.backends.tilelang import linear as tilelang_linear
from ternarize.backends.torch.update import NONFINITE_LOSS, NONFINITE_OUTPUT
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
    """Stands in for TileLang on a machine without a GPU: the reference, which writes Inf for layers that are broken."""

    def __init__(self) -> None:
        self.broken: list[TernaryLinear] = []
        self.calls = 0

    def __call__(self, *args: Any) -> list[Tensor]:
        *given, status, group_size = args
        self.calls += 1
        outputs: list[Tensor] = torch.ops.ternarize.linear_torch(*given, group_size)
        for packed, y in zip(given[1], outputs, strict=True):
            if any(packed.data_ptr() == layer.T_packed.data_ptr() for layer in self.broken):
                y[0].fill_(torch.inf)
        for row, y in zip(status, outputs, strict=bool(status)):
            row[0] |= int(not y.isfinite().all()) * NONFINITE_OUTPUT
        return outputs


@pytest.fixture
def fake_tilelang(tilelang_chosen: None, monkeypatch: pytest.MonkeyPatch) -> FakeTileLang:
    fake = FakeTileLang()
    monkeypatch.setattr(tilelang_linear, "linear", fake)
    return fake


def test_output_of_a_sound_kernel_passes(
    block: nn.Module, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang, lowered_graphs: Graphs
) -> None:
    x = torch.randn(2, 5, 32)
    compiled = compile_fresh(block)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
    assert lowered_graphs == [Counter(linear_tilelang=4)]
    assert fake_tilelang.calls == 4


def test_what_kernels_write_to_stays_where_it_is_so_that_cuda_graphs_are_used(
    block: nn.Module,
    compile_fresh: Callable[..., Any],
    fake_tilelang: FakeTileLang,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Inductor records no graph that mutates any other input.
    from torch._inductor import compile_fx

    seen: list[tuple[set[int], set[int]]] = []
    original = compile_fx.compile_fx_inner

    def record(graph: Any, inputs: Any, **settings: Any) -> Any:
        result: Any = original(graph, inputs, **settings)
        seen.append((set(result.mutated_input_idxs), set(settings["static_input_idxs"])))
        return result

    monkeypatch.setattr(compile_fx, "compile_fx_inner", record)
    with torch.no_grad():
        compile_fresh(block)(torch.randn(2, 5, 32))
    ((mutated, static),) = seen
    assert len(mutated) == 1
    assert mutated <= static


def test_the_kernel_that_writes_inf_is_replaced_and_no_other(
    block: Any, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    x = torch.randn(2, 5, 32)
    compiled = compile_fresh(block)
    block.k.name = "blocks.0.k"
    with torch.no_grad():
        compiled(x)
        # All that comes after it gets NaN as well.
        fake_tilelang.broken = [block.k]
        message = r"TileLang wrote NaN or Inf from finite input of shape \[2, 5, 32\]: blocks\.0\.k \[32x32\]: Triton"
        with pytest.warns(RuntimeWarning, match=message) as warned:
            first = compiled(x)
        assert len(warned) == 1
        torch.testing.assert_close(first, block(x))
        torch.testing.assert_close(compiled(x), block(x))
    assert [name for name, layer in ternary_layers(block) if not layer.tilelang] == ["k"]


def test_kernels_that_all_write_inf_are_all_found_at_once(
    block: Any, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    x = torch.randn(2, 5, 32)
    layers = [layer for _, layer in ternary_layers(block)]
    fake_tilelang.broken = layers
    with torch.inference_mode(), pytest.warns(RuntimeWarning, match="TileLang wrote NaN or Inf") as warned:
        torch.testing.assert_close(compile_fresh(block)(x), block(x))
    assert len(warned) == 1
    assert not any(layer.tilelang for layer in layers)


def test_the_layers_of_a_checkpointed_part_are_guarded(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    layer = make_layer(32, 8)

    def run(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(layer, x, use_reentrant=False)
        return y + 1

    fake_tilelang.broken = [layer]
    x = torch.randn(3, 32)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="TileLang wrote NaN or Inf"):
        torch.testing.assert_close(compile_fresh(run)(x), layer(x) + 1)
    assert not layer.tilelang


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_the_user_put_in_is_not_the_kernels_fault(
    block: Any, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang, value: float
) -> None:
    x = torch.randn(2, 5, 32)
    x[1, 3] = value
    with torch.no_grad():
        compiled = compile_fresh(block)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), block(x), equal_nan=True)
        assert all(layer.tilelang for _, layer in ternary_layers(block))
        # But what is wrong beside it is found.
        fake_tilelang.broken = [block.gate]
        with pytest.warns(RuntimeWarning, match="TileLang wrote NaN or Inf"):
            torch.testing.assert_close(compiled(x), block(x), equal_nan=True)
    assert [name for name, layer in ternary_layers(block) if not layer.tilelang] == ["gate"]


def test_a_result_beyond_the_range_of_its_dtype_is_not_the_kernels_fault(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    layer = make_layer(32, 8)
    layer.E.fill_(3)
    x = torch.full((3, 32), 6e4, dtype=torch.float16)
    with torch.no_grad():
        assert compile_fresh(layer)(x).isinf().any()
    assert layer.tilelang


def test_a_forced_kernel_that_writes_inf_raises(
    make_layer: MakeLayer,
    compile_fresh: Callable[..., Any],
    fake_tilelang: FakeTileLang,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(32, 8)
    fake_tilelang.broken = [layer]
    x = torch.randn(3, 32)
    with torch.no_grad(), pytest.raises(NonFiniteError, match="use kernels=auto"):
        compile_fresh(layer, options={"kernels": "tilelang"})(x)
    monkeypatch.setenv("TERNARIZE_BACKEND", "tilelang")
    with torch.no_grad(), pytest.raises(NonFiniteError, match="use kernels=auto"):
        compile_fresh(layer)(x)


def test_the_guard_can_be_switched_off(
    make_layer: MakeLayer,
    compile_fresh: Callable[..., Any],
    fake_tilelang: FakeTileLang,
    lowered_graphs: Graphs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERNARIZE_CHECK_FINITE", "0")
    layer = make_layer(32, 8)
    fake_tilelang.broken = [layer]
    with torch.no_grad():
        assert compile_fresh(layer)(torch.randn(3, 32)).isinf().any()
    assert layer.tilelang
    assert layer.status.tolist() == [0, 0]
    assert lowered_graphs == [Counter(linear_tilelang=1)]


def test_a_graph_out_of_the_cache_reports_to_flags_of_its_own(block: Any, fake_tilelang: FakeTileLang) -> None:
    x = torch.randn(2, 5, 32)
    with fresh_inductor_cache(), torch.no_grad():
        for broken in ([], [block.k]):
            torch._dynamo.reset()
            counters.clear()
            fake_tilelang.broken = broken
            compiled: Any = torch.compile(block, backend="ternary", fullgraph=True)
            with pytest.warns(RuntimeWarning, match="TileLang wrote") if broken else contextlib.nullcontext():
                torch.testing.assert_close(compiled(x), block(x))
            assert counters["inductor"]["fxgraph_cache_hit"] == len(broken)


class Step(nn.Module):
    """Two layers around a cache of one token, as in decoding."""

    def __init__(self, first: TernaryLinear, second: TernaryLinear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, cache: Tensor, x: Tensor, position: Tensor) -> Tensor:
        cache.index_copy_(0, position, self.first(x))
        y: Tensor = self.second(cache.sum(0))
        return y


def test_a_graph_that_writes_to_its_inputs_is_not_run_twice_but_switched_at_the_next_call(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    step = Step(make_layer(32, 8), make_layer(8, 4, group_size=8))
    cache, x = torch.zeros(6, 8), torch.randn(1, 32)
    positions = torch.arange(6).split(1)
    compiled = compile_fresh(step)
    with torch.no_grad():
        compiled(cache, x, positions[0])
        fake_tilelang.broken = [step.first]
        compiled(cache, x, positions[1])
        fake_tilelang.broken = []
        assert cache[:, 0].isinf().tolist() == [False, True, False, False, False, False]
        with pytest.warns(RuntimeWarning, match=r"in an earlier call, which wrote to its inputs: unnamed \[8x32\]"):
            compiled(cache, x, positions[2])
        # The second layer raises its flag, because the cache holds Inf: not its fault.
        compiled(cache, x, positions[3])
        compiled(cache, x, positions[4])
        assert (step.first.tilelang, step.second.tilelang) == (False, True)
        # With a fresh cache it is under suspicion again.
        cache.zero_()
        compiled(cache, x, positions[0])
        fake_tilelang.broken = [step.second]
        compiled(cache, x, positions[1])
        with pytest.warns(RuntimeWarning, match=r"unnamed \[4x8\]"):
            compiled(cache, x, positions[2])
    assert not step.second.tilelang


def test_a_forced_kernel_that_writes_inf_in_such_a_graph_raises_at_the_next_call(
    make_layer: MakeLayer, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang
) -> None:
    step = Step(make_layer(32, 8), make_layer(8, 4, group_size=8))
    cache, x, position = torch.zeros(6, 8), torch.randn(1, 32), torch.tensor([2])
    fake_tilelang.broken = [step.second]
    compiled = compile_fresh(step, options={"kernels": "tilelang"})
    with torch.no_grad():
        compiled(cache, x, position)
        with pytest.raises(NonFiniteError, match=r"in an earlier call.*\[4x8\]"):
            compiled(cache, x, position)


def test_sizes_of_a_batch_share_one_guarded_graph(
    block: nn.Module, compile_fresh: Callable[..., Any], fake_tilelang: FakeTileLang, lowered_graphs: Graphs
) -> None:
    compiled = compile_fresh(block, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 7, 16):
            x = torch.randn(batch, 5, 32)
            torch.testing.assert_close(compiled(x), block(x))
    assert len(lowered_graphs) == 1


def test_a_status_tensor_leads_to_its_layer_also_after_a_copy(make_layer: MakeLayer) -> None:
    layer = make_layer(32, 8)
    twin = copy.deepcopy(layer)
    assert guard.layer_of(layer.status) is layer
    assert guard.layer_of(twin.status) is twin
