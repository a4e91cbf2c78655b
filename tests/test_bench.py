import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ternarize import ops
from ternarize.activation import quantize_activation
from ternarize.bench import contenders as contenders_module
from ternarize.bench.ceilings import Ceilings, measure_ceilings
from ternarize.bench.contenders import baselines, random_contenders
from ternarize.bench.linear import CHECKED_TOKENS, Plan, Result, dense_seconds, measure_shape, sample_rows
from ternarize.bench.timing import MIN_ROUNDS, copies_needed, record, time_in_turns
from ternarize.bench.training import random_step, update
from ternarize.config import TernaryConfig

CPU = torch.device("cpu")


def plan(**changes: Any) -> Plan:
    defaults: dict[str, Any] = {
        "tokens": (1, 5),
        "config": TernaryConfig(group_size=32),
        "dtype": torch.bfloat16,
        "kernels": ("torch",),
        "device": CPU,
        "seconds_per_cell": 0.0,
    }
    return Plan(**(defaults | changes))


def replace_torch_kernel(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let the op of the torch backend return ``change`` of what it should."""
    right = ops.lowered("linear", "torch")
    monkeypatch.setattr(ops, "lowered", lambda *_: lambda *arguments: [change(y) for y in right(*arguments)])


class FakePass:
    def __init__(self, name: str, samples: Sequence[float], log: list[str]) -> None:
        self.name, self.samples, self.log, self.output = name, list(samples), log, torch.zeros(())

    def run(self) -> float:
        self.log.append(self.name)
        return self.samples.pop(0)


# Timing.


def test_passes_run_in_turns_and_their_medians_are_reported() -> None:
    log: list[str] = []
    first = FakePass("a", [1, 100, 2, 3, 4], log)
    second = FakePass("b", [20, 20, 20, 20, 20], log)
    slow, even = time_in_turns([first, second], seconds=0)
    assert log == ["a", "b"] * MIN_ROUNDS
    assert (slow.seconds, even.seconds) == (3, 20)
    # The quartiles are 1.5 and 52.
    assert slow.spread == pytest.approx((52 - 1.5) / 3)
    assert even.spread == 0


def test_nothing_to_time_is_no_timing() -> None:
    assert time_in_turns([], seconds=60) == []


def test_a_pass_on_the_cpu_runs_every_call_and_keeps_the_last_output() -> None:
    calls = [functools.partial(torch.tensor, i) for i in range(3)]
    timed = record(calls, CPU)
    assert timed.run() > 0
    assert timed.output == 2


def test_copies_of_a_weight_fill_the_l2_cache_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=60_000_000))
    cuda = torch.device("cuda")
    assert copies_needed(4_000_000, cuda) == 60
    assert copies_needed(500_000_000, cuda) == 1
    assert copies_needed(1, cuda) == 512
    assert copies_needed(1, CPU) == 1


@pytest.mark.gpu
def test_a_graph_times_its_calls_and_leaves_the_right_output() -> None:
    x = torch.randn(64, 64, device="cuda")
    weights = [torch.randn(64, 64, device="cuda") for _ in range(3)]
    timed = record([functools.partial(torch.matmul, x, w) for w in weights], torch.device("cuda"))
    (timing,) = time_in_turns([timed], seconds=0.05)
    assert 1e-7 < timing.seconds < 1e-4
    torch.testing.assert_close(timed.output, x @ weights[-1])


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_current_stream_and_later_captures_alone() -> None:
    x, stream = torch.ones(1, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        record([lambda: x * x.item()], torch.device("cuda"))
    assert torch.cuda.current_stream() == stream
    assert record([lambda: x + x], torch.device("cuda")).run() > 0


# Contenders.


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "group_size"), [(96, 32), (96, -1), (100, 64)])
def test_the_packed_layer_and_the_dense_weight_are_the_same(
    planes: Literal[1, 2, 3], dtype: torch.dtype, K: int, group_size: int
) -> None:
    config = TernaryConfig(group_size=group_size, planes=planes)
    *_, kernel = random_contenders(48, K, config, dtype, ("torch",), CPU)
    eye = torch.eye(K, dtype=dtype)
    assert torch.equal(kernel.multiply(eye, *kernel.copies[0]), kernel.weight.t())


def test_every_copy_is_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "copies_needed", lambda *_: 3)
    for contender in random_contenders(16, 32, TernaryConfig(), torch.bfloat16, ("torch",), CPU):
        assert len({copy[0].data_ptr() for copy in contender.copies}) == (0 if contender.name == "gemlite" else 3)
        assert all(torch.equal(copy[0].float(), contender.copies[0][0].float()) for copy in contender.copies)


def test_eight_bit_products_need_sizes_that_their_units_take() -> None:
    _, int8, fp8 = baselines(torch.randn(24, 100).bfloat16())
    x = torch.randn(4, 100).bfloat16()
    assert "multiples of 8, got 24x100" in str(int8.refusal(x))
    assert "multiples of 16, got 24x100" in str(fp8.refusal(x))


class FakeGemLite:
    """What is used of GemLite, on codes that are not packed: it is not installed where these tests run."""

    def __init__(self, W_nbits: int, group_size: int, in_features: int, out_features: int, **_: object) -> None:
        self.facts = [W_nbits, group_size]

    def pack(self, W_q: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self.tensors = [W_q, scales, zeros]

    def get_tensor_args(self) -> list[Tensor]:
        return self.tensors

    def get_meta_args(self) -> list[int]:
        return self.facts

    @staticmethod
    def forward_functional(x: Tensor, bias: None, tensors: list[Tensor], facts: list[int]) -> Tensor:
        codes, scales, zeros = tensors
        assert codes.dtype == torch.uint8
        assert codes.max() < 2 ** facts[0]
        weight = (codes.reshape(-1, facts[1]) - zeros) * scales
        return x @ weight.reshape(codes.shape).t()


def test_gemlite_gets_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(
        TORCH_TO_DTYPE={torch.bfloat16: None},
        GemLiteLinearTriton=FakeGemLite,
        forward_functional=FakeGemLite.forward_functional,
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "gemlite", core)
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    x = torch.randn(3, 64).bfloat16()
    for group_size, K, refusal in ((32, 64, "need cuda"), (64, 96, "divide K"), (-1, 64, "divide K")):
        *_, gemlite, _ = random_contenders(16, K, TernaryConfig(group_size=group_size), torch.bfloat16, ("torch",), CPU)
        assert refusal in str(gemlite.refusal(x))
        if gemlite.copies:
            torch.testing.assert_close(gemlite.multiply(x, *gemlite.copies[0]), x @ gemlite.weight.t())


# Cells.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_contender_is_checked_and_timed(dtype: torch.dtype) -> None:
    cells = list(measure_shape(32, 64, plan(dtype=dtype, kernels=("tilelang", "triton", "torch"))))
    assert [cell[0].tokens for cell in cells] == [1, 5]
    for cell in cells:
        results = {result.contender: result for result in cell}
        assert list(results) == ["dense", "int8", "fp8", "gemlite", "tilelang", "triton", "torch"]
        for name in ("dense", "fp8", "torch"):
            result = results[name]
            assert (result.status, result.reason) == ("ok", "")
            assert result.seconds is not None
            assert result.seconds > 0
            assert result.error is not None
            assert 0 < result.error < 1e-2
        assert dense_seconds(cell) == results["dense"].seconds
    if not torch.cuda.is_available():
        assert results["tilelang"].status == "not run"
        assert "need cuda" in results["tilelang"].reason
        assert results["int8"].error == 0


def test_bytes_and_arithmetic_are_counted_once_each() -> None:
    _, (dense, int8, _, _, torch_kernel) = measure_shape(32, 64, plan())
    assert dense.flops == torch_kernel.flops == 2 * 5 * 32 * 64
    assert dense.bytes == 2 * (32 * 64 + 5 * 64 + 5 * 32)
    assert int8.bytes == 32 * 64 + 5 * 64 + 4 * 5 * 32
    assert torch_kernel.bytes == 32 * 64 // 4 + 32 * 2 + 2 * (5 * 64 + 5 * 32)


def test_rounding_x_to_int8_is_part_of_the_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders_module, "_quantize", quantize_activation)
    *_, plain, rounded = next(measure_shape(32, 64, plan(activations=("float", "int8"))))
    assert (plain.contender, plain.rate) == ("torch", "dense")
    assert (rounded.contender, rounded.rate, rounded.status) == ("torch int8", "int8", "ok")
    assert rounded.error is not None
    assert rounded.error < 2e-3
    # Of x as it is, the product is ten times further away.
    x = torch.randn(5, 64).bfloat16()
    *_, contender = random_contenders(32, 64, TernaryConfig(), torch.bfloat16, ("torch",), CPU, ("int8",))
    y, exact = contender.multiply(x, *contender.copies[0]).double(), x.double() @ contender.weight.double().t()
    assert (y - exact).norm() > 4e-3 * exact.norm()


@pytest.mark.parametrize(
    "change", [lambda y: y * 1.01, lambda y: y.index_fill(-1, torch.tensor(3), torch.nan)], ids=["a little", "nan"]
)
def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    replace_torch_kernel(monkeypatch, change)
    for *others, wrong in measure_shape(32, 64, plan()):
        assert (wrong.contender, wrong.status, wrong.seconds) == ("torch", "wrong", None)
        assert "in the first call, allowed is 2.0e-03" in wrong.reason
        assert all(result.status == "ok" for result in others if result.contender != "gemlite")


def test_a_result_that_turns_wrong_under_load_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def wrong_from_the_fourth_call_on(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return y if calls < 4 else -y

    replace_torch_kernel(monkeypatch, wrong_from_the_fourth_call_on)
    ((*_, wrong),) = measure_shape(32, 64, plan(tokens=(1,)))
    assert (wrong.status, wrong.seconds) == ("wrong", None)
    assert "relative error 2.0e+00 in the timed calls" in wrong.reason


def test_a_kernel_that_raises_is_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("out of registers\nand a long dump")

    replace_torch_kernel(monkeypatch, broken)
    for *others, failed in measure_shape(32, 64, plan()):
        assert (failed.contender, failed.status) == ("torch", "failed")
        assert failed.reason == "RuntimeError: out of registers"
        assert all(result.status == "ok" for result in others if result.contender != "gemlite")


def test_a_layer_that_cannot_be_made_is_one_result_a_cell() -> None:
    # Small enough to say, too large for any memory.
    cells = list(measure_shape(2**31, 2**20, plan()))
    assert [len(cell) for cell in cells] == [1, 1]
    for (failed,), tokens in zip(cells, (1, 5), strict=True):
        assert (failed.contender, failed.status, failed.tokens) == ("all", "failed", tokens)
        assert "memory" in failed.reason


def test_x_that_cannot_be_made_fails_its_cell_only() -> None:
    first, second = measure_shape(32, 64, plan(tokens=(2**40, 1)))
    assert [result.status for result in first] == ["failed"]
    assert [result.status for result in second] == ["ok", "ok", "ok", "not run", "ok"]


@pytest.mark.parametrize("M", [1, 7, 256, 257, 1000, 4096])
def test_sampled_rows_leave_out_no_part(M: int) -> None:
    rows = sample_rows(M, CPU)
    assert len(rows) == len(rows.unique()) == min(M, CHECKED_TOKENS)
    edges = torch.cat([torch.tensor([0]), rows, torch.tensor([M - 1])])
    assert edges.diff().min() >= 0
    assert edges.diff().max() < 2 * math.ceil(M / CHECKED_TOKENS)


def test_ceilings_are_measured_and_the_larger_one_is_the_floor() -> None:
    ceilings = measure_ceilings(plan())
    assert ceilings.bytes_per_second == max(ceilings.read_bytes_per_second, ceilings.copy_bytes_per_second) > 0
    assert set(ceilings.flops_per_second) == {"dense", "int8", "fp8"}
    known = Ceilings(read_bytes_per_second=100, copy_bytes_per_second=50, flops_per_second={"dense": 10})
    result = Result(out_features=3, in_features=5, tokens=2, contender="torch", rate="dense", bytes=1000)
    assert known.floor(result) == 10  # bytes: 60 operations take 6 s
    result.bytes = 100
    assert known.floor(result) == 6
    result.rate = "int8"
    assert known.floor(result) is None


# Training.


def test_grad_input_is_measured_like_linear() -> None:
    for cell in measure_shape(24, 64, plan(op="grad-input", kernels=("tilelang", "torch"))):
        assert [result.contender for result in cell] == ["dense", "tilelang", "torch"]
        dense, tilelang, kernel = cell
        assert (kernel.out_features, kernel.in_features, kernel.flops) == (24, 64, dense.flops)
        assert (dense.status, kernel.status, tilelang.status) == ("ok", "ok", "not run")
        assert tilelang.reason == "tilelang has no kernel for grad_input"
        assert kernel.seconds is not None
        assert kernel.bytes == 24 * 64 // 4 + 24 * 2 + 2 * kernel.tokens * (24 + 64)


def test_a_wrong_grad_input_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.lowered("grad_input", "torch")
    monkeypatch.setattr(ops, "lowered", lambda *_: lambda *arguments: 1.01 * right(*arguments))
    for dense, wrong in measure_shape(24, 64, plan(op="grad-input")):
        assert (dense.status, wrong.status, wrong.seconds) == ("ok", "wrong", None)


def test_an_update_is_checked_by_its_integers() -> None:
    for dense, kernel in measure_shape(24, 64, plan(op="update", tokens=(300, 5))):
        assert (dense.status, kernel.status) == ("ok", "ok")
        assert kernel.seconds is not None
        assert kernel.error is not None
        assert kernel.error <= 1e-4
        assert kernel.flops == dense.flops


def test_updates_that_are_timed_are_steps_of_one_micro_batch_each() -> None:
    step = random_step(24, 64, 5, TernaryConfig(), torch.float32, CPU)
    for _ in range(2):
        update("torch", step.grad_y, step.x, step.before)
        assert step.before.status.tolist() == [0, 0]


def test_an_update_with_wrong_integers_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.lowered

    def other_gradient(stem: str, backend: str) -> Callable[..., object]:
        op = right(stem, backend)
        if stem != "update_stage":
            return op
        # The check's own reference has float64 operands.
        return lambda grad_y, x, *rest: op(grad_y if x.dtype == torch.float64 else [-grad_y[0]], x, *rest)

    monkeypatch.setattr(ops, "lowered", other_gradient)
    for dense, wrong in measure_shape(24, 64, plan(op="update")):
        assert (dense.status, wrong.status, wrong.seconds) == ("ok", "wrong", None)
        assert "in the first call, allowed is 1.0e-04" in wrong.reason
