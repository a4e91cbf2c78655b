import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, dequantize
from ternarize.backends.select import tilelang_trains
from ternarize.bench import train_step
from ternarize.bench.clocks import Laps
from ternarize.bench.llama import multiplied_weights, trainable_model, with_layers
from ternarize.bench.process import ContenderError, Process
from ternarize.bench.timing import MIN_ROUNDS
from ternarize.bench.train import Plan, measure_training, teraflops
from ternarize.bench.train_step import Contender, Task, Training, bytes_a_weight
from ternarize.bench.turns import Result, times_dense
from ternarize.cli import FAILURE, INTERRUPTED, OK, bench_train, main
from ternarize.config import Kernels, kernels_policy
from ternarize.layer import ternary_layers
from tests.bench_kit import CPU, TINY, Local, assert_usage_error, interrupt_at

INT8 = TernaryConfig(group_size=32)
INT4 = TernaryConfig(group_size=32, accumulator="int4")

ONE_LAYER = with_layers(TINY, 1)

#: Weights of its block, and with its head.
IN_BLOCK = 2 * 32 * (32 + 16) + 3 * 32 * 96
MULTIPLIED = IN_BLOCK + 64 * 32

Loss = Callable[[Tensor], Tensor]

measure_locally = functools.partial(measure_training, start=functools.partial(Local, Contender))


def plan(**changes: Any) -> Plan:
    defaults: dict[str, Any] = {
        "config": ONE_LAYER,
        "contenders": {"dense": (None, "auto", "step"), "auto int8": (INT8, "auto", "step")},
        "batch": 4,
        "ctx": 32,
        "checkpointing": False,
        "trace_memory": False,
        "device": CPU,
        "seconds": 0.0,
    }
    return Plan(**(defaults | changes))


def compile_nothing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Loss], Loss] = lambda loss: loss) -> None:
    """Leave dense steps as they are, and ternary ones but for a change; short stretches."""
    monkeypatch.setattr(train_step, "STRETCH_STEPS", 1)

    def compile_step(loss: Loss, kernels: str | None, **_: bool) -> Loss:
        return loss if kernels is None else change(loss)

    monkeypatch.setattr(train_step, "compile_step", compile_step)


def measured_wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[Loss], Loss]) -> Result[Any]:
    compile_nothing(monkeypatch, change)
    dense, wrong = measure_locally(plan())
    assert (dense.status, dense.reason) == ("ok", "")
    assert wrong.seconds is None
    return wrong


# Models.


@pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
def test_the_ternary_model_starts_from_the_weights_of_the_dense_one(config: TernaryConfig) -> None:
    dense, ternary = (trainable_model(ONE_LAYER, each, device=CPU) for each in (None, config))
    assert dense.training
    assert ternary.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in dense.parameters())
    assert all(p.requires_grad == p.is_floating_point() for p in ternary.parameters())
    assert len(list(ternary_layers(ternary))) == 7
    rounded = dict(dequantize(ternary).named_parameters())
    for name, weight in dense.named_parameters():
        same = rounded[name] == weight
        # What is rounded to a trit has the sign of the weight, or is 0.
        assert same.all() or (rounded[name] * weight >= 0).all(), name
        assert weight.dim() == 1 or weight.detach().std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)


def test_a_config_is_cut_with_all_that_it_says_of_each_layer() -> None:
    config = TINY | {"layer_types": ["full_attention", "sliding_attention"]}
    assert with_layers(config, 1) == TINY | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    assert with_layers(TINY, 1) == TINY | {"num_hidden_layers": 1}


def test_the_head_counts_as_work_and_the_embedding_does_not() -> None:
    assert multiplied_weights(ONE_LAYER) == MULTIPLIED


@pytest.mark.parametrize(
    ("config", "bits"), [(None, 128.0), (INT8, 2 + 16 + 8), (INT4, 2 + 8 + 8)], ids=["dense", "int8", "int4"]
)
def test_bytes_of_weights_gradients_and_optimizer_state_are_counted(config: TernaryConfig | None, bits: float) -> None:
    contenders = {"it": (config, "auto", "step")}
    training = Training(plan(contenders=contenders).task("it"), ONE_LAYER, compiled=False, autocast=False)
    training.step()
    # Exponents, and for each layer statistics and their sums: 2 and 4 bytes, and 4 bytes of status, 24 of rng.
    layers = list(ternary_layers(training.model))
    more = sum(layer.E.numel() + 6 * (layer.in_features + layer.out_features) + 32 for _, layer in layers)
    # AdamW counts the steps of each of its parameters in a float32.
    more += 0 if layers else 4 * 7
    assert bytes_a_weight(training.model, training.optimizer) == pytest.approx(bits / 8 + more / IN_BLOCK)


# Contenders.


def test_all_are_checked_and_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    asked: list[tuple[str, str]] = []

    class Logged(Local):
        def ask(self, method: str) -> None:
            super().ask(method)
            asked.append(("dense" if self.task.ternary is None else self.task.ternary.accumulator, method))

    contenders = {
        "dense": (None, "auto", "step"),
        "auto int8": (INT8, "auto", "step"),
        "auto int4": (INT4, "auto", "step"),
    }
    results = measure_training(plan(contenders=contenders), functools.partial(Logged, Contender))
    assert [(result.contender, result.status, result.reason) for result in results] == [
        (name, "ok", "") for name in contenders
    ]
    names = ["dense", "int8", "int4"]
    assert (
        asked[: 3 + 3 * MIN_ROUNDS]
        == [(name, "prepare") for name in names] + [(name, "run") for name in names] * MIN_ROUNDS
    )
    for result in results:
        ready = result.ready
        assert result.tokens == 128
        assert result.seconds is not None
        assert ready is not None
        assert ready.losses[-1] < ready.losses[0]
        assert 0 < ready.loss_error < train_step.LOSS_TOLERANCE
        assert ready.graph_breaks == 0
        assert ready.first_step_seconds > 0
        assert list(result.phases) == ["forward", "backward", "update"]
        assert all(seconds > 0 for seconds in result.phases.values())
        assert teraflops(result) == pytest.approx(6 * MULTIPLIED * 128 / result.seconds / 1e12)
    dense, int8, _ = results
    assert dense.ready is not None
    assert int8.ready is not None
    assert dense.ready.integer_error is None
    # The eager step under autocast is what the bound is measured with.
    assert int8.ready.allowed_integer_error is not None
    assert int8.ready.integer_error == pytest.approx(int8.ready.allowed_integer_error / 2)
    assert times_dense(int8, results) == dense.seconds / int8.seconds  # type: ignore[operator]


def test_a_wrong_loss_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = measured_wrong(monkeypatch, lambda loss: lambda tokens: loss(tokens) * 1.01)
    assert wrong.status == "wrong"
    assert wrong.reason.startswith("in the first calls: loss off by ")


def test_wrong_gradients_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # The same loss, but its gradient is that of other tokens.
    def change(loss: Loss) -> Loss:
        return lambda tokens: loss(tokens).detach() + (other := loss(tokens.roll(1, 0).roll(1, 1))) - other.detach()

    wrong = measured_wrong(monkeypatch, change)
    assert wrong.status == "wrong"
    assert "of a layer's integers differ, allowed are" in wrong.reason


def test_a_loss_that_is_not_finite_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = measured_wrong(monkeypatch, lambda loss: lambda tokens: loss(tokens) * torch.nan)
    assert wrong.status == "wrong"
    assert "loss off by nan" in wrong.reason
    assert "the loss on one batch went from nan to nan: it must be finite and fall" in wrong.reason


def test_a_loss_that_does_not_fall_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = measured_wrong(monkeypatch, lambda loss: lambda tokens: loss(tokens) * 0 + 3)
    assert wrong.status == "wrong"
    assert "went from 3 to 3: it must be finite and fall" in wrong.reason


def test_a_step_that_is_refused_in_the_timed_calls_takes_the_time_away(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def turning(loss: Loss) -> Loss:
        def run(tokens: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(tokens) * (torch.nan if calls == 15 else 1)

        return run

    wrong = measured_wrong(monkeypatch, turning)
    assert (wrong.status, wrong.reason) == ("wrong", "after the timed calls: 1 steps refused")


def test_a_step_that_raises_is_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(loss: Loss) -> Loss:
        raise RuntimeError("out of registers")

    failed = measured_wrong(monkeypatch, broken)
    assert (failed.status, failed.reason, failed.ready) == ("failed", "out of registers", None)


def test_a_process_tells_what_was_raised_inside_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    remote = Process(Contender, plan(contenders={"it": (INT8, "triton", "step")}).task("it"))
    remote.ask("prepare")
    with pytest.raises(ContenderError, match="KernelError: kernels=triton cannot run"):
        remote.answer()
    remote.close()


@pytest.mark.parametrize(("kernels", "gate"), [("torch", False), ("tilelang", True)])
def test_a_contender_uses_its_kernels_outside_of_graphs_too(
    monkeypatch: pytest.MonkeyPatch, kernels: Kernels, gate: bool
) -> None:
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "triton")
    monkeypatch.setattr(train_step, "_compare", lambda task: (0.0, None, None))
    seen: list[tuple[str, bool]] = []
    losses = iter([3.0, *[2.0] * 99])

    def step(self: Training, laps: Laps | None = None) -> Tensor:
        seen.append((kernels_policy(), tilelang_trains()))
        return torch.tensor(next(losses))

    monkeypatch.setattr(Training, "step", step)
    contender = Contender(plan(contenders={"it": (INT8, kernels, "step")}).task("it"))
    assert contender.prepare().fault == ""
    contender.run()
    assert set(seen) == {(kernels, gate)}
    assert kernels_policy() == "triton"


@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [(INT8, False), (INT4, True), (None, True)],
    ids=["int8", "int4-checkpointed", "dense-checkpointed"],
)
def test_a_step_compiles_to_one_graph_that_agrees_with_the_reference(
    config: TernaryConfig | None, checkpointing: bool
) -> None:
    contenders = {"it": (config, "auto", "step")}
    contender = Contender(plan(contenders=contenders, checkpointing=checkpointing).task("it"))
    ready = contender.prepare()
    assert ready.fault == ""
    assert ready.graph_breaks == 0
    assert ready.kernels == ({} if config is None else {"torch": 7})
    model = contender._training.model
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert bool(blocks) == checkpointing
    assert contender.run().seconds > 0
    assert contender.check() == ""


def test_checkpointing_runs_each_block_again() -> None:
    runs = []
    for checkpointing in (False, True):
        task = plan(checkpointing=checkpointing).task("auto int8")
        training = Training(task, ONE_LAYER, compiled=False, autocast=False)
        calls: list[nn.Module] = []
        block = training.model.get_submodule("model.layers.0.self_attn.q_proj")
        block.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        training.step()
        runs.append(len(calls))
    assert runs == [1, 2]


# The command.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compile_nothing(monkeypatch)
    monkeypatch.setattr(bench_train, "measure_training", measure_locally)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return ["--model", str(file), "--batch", "4", "--ctx", "32", "--group-size", "32", "--seconds", "0"]


def test_bench_train_reports_every_contender(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--layers", "1", "--kernels", "auto,torch", "--device", "cpu", "--checkpointing", "--json"]
    assert main(["bench", "train", *tiny, *more]) == OK
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == (
        f"ternarize bench train --model {tiny[1]} --layers 1 --batch 4 --ctx 32 --rule factored "
        "--accumulator int8,int4 --apply step --kernels auto,torch --group-size 32 --seconds 0 --device cpu "
        "--checkpointing"
    )
    cells = {cell["contender"]: cell for cell in report["cells"]}
    assert list(cells) == [
        "dense",
        "auto int8",
        "torch int8",
        "auto int4",
        "torch int4",
    ]
    cell = cells["torch int4"]
    assert cell["tokens_per_second"] == pytest.approx(128e3 / cell["milliseconds"])
    assert cell["times_dense"] == pytest.approx(cells["dense"]["milliseconds"] / cell["milliseconds"])
    assert cell["teraflops_per_second"] == pytest.approx(6e-9 * MULTIPLIED * 128 / cell["milliseconds"])
    assert min(cell[f"{part}_milliseconds"] for part in ("forward", "backward", "update")) > 0
    assert cells["dense"]["bytes_a_weight"] == pytest.approx(16, abs=0.01)
    assert cell["integer_error"] <= cell["allowed_integer_error"]


def test_modes_of_the_update_are_contenders_of_their_own(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Task] = []

    def nobody(plan: Plan) -> list[Result[Any]]:
        tasks.extend(plan.task(name) for name in plan.contenders)
        return [Result(contender=name, batch=1, tokens=1) for name in plan.contenders]

    monkeypatch.setattr(bench_train, "measure_training", nobody)
    more = ["--accumulator", "int4", "--apply", "step,backward", "--kernels", "triton", "--json"]
    assert main(["bench", "train", *tiny, *more]) == OK
    names = [cell["contender"] for cell in json.loads(capsys.readouterr().out)["cells"]]
    assert names == ["dense", "triton int4", "triton int4 backward"]
    assert [task.apply for task in tasks] == ["step", "step", "backward"]
    given: list[Any] = []
    monkeypatch.setattr(train_step, "build_optimizer", lambda model, *_, ternary, **__: given.append(ternary))
    Training(tasks[2], ONE_LAYER, compiled=False, autocast=False)
    assert given == [{"lr": 1.4 / 254, "apply": "backward", "skip_nonfinite": True}]


def test_bench_train_prints_a_table(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_step, "_weight_sized_allocations", lambda task: {"96x32 of 4 bytes": 3})
    monkeypatch.setattr(bench_train, "measure_training", lambda plan: measure_locally(replace(plan, trace_memory=True)))
    assert main(["bench", "train", *tiny, "--rule", "sign"]) == OK
    out = capsys.readouterr().out
    for words in ("train, 4 x 32 tokens", "x dense", "B/w", "auto sign", "0 graph breaks", "backward"):
        assert words in out
    assert "…" not in out
    assert "allocations the size of a float matrix: 3 of 96x32 of 4 bytes" in out


def test_an_interrupt_in_the_timed_rounds_keeps_them(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Contender, "run", interrupt_at(3, Contender.run))
    assert main(["bench", "train", *tiny, "--accumulator", "int8"]) == INTERRUPTED
    captured = capsys.readouterr()
    assert "TFLOP/s, forward" in captured.out
    assert "batch 4 was cut short, rounds of timing: 2" in captured.err
    assert captured.err.endswith("ternarize: error: interrupted\n")


def test_a_wrong_step_fails_the_run(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_nothing(monkeypatch, lambda loss: lambda tokens: loss(tokens) * torch.nan)
    assert main(["bench", "train", *tiny, "--accumulator", "int8", "--json"]) == FAILURE
    dense, wrong = json.loads(capsys.readouterr().out)["cells"]
    assert (dense["status"], wrong["status"], wrong["loss_error"]) == ("ok", "wrong", None)
    assert wrong["losses"] == [None] * train_step.FIRST_STEPS
    assert "milliseconds" not in wrong
    assert main(["bench", "train", *tiny, "--accumulator", "int8"]) == FAILURE
    assert "wrong: in the first calls: loss off by nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ctx", "1,2"], "'1,2' is no positive number"),
        (["--kernels", "cuda"], "'cuda' is not among kernels"),
        (["--apply", "never"], "'never' is not among modes"),
        (["--accumulator", "int16"], "'int16' is not among accumulators"),
        (["--rule", "sign", "--accumulator", "int4"], "accumulator='int4' is a form of the 'factored' rule"),
        (["--group-size", "3"], "group_size 3 is not a positive multiple of 4"),
        (["--model", "9b"], "--model '9b'"),
        (["--device", "tpu"], "'tpu' is no device"),
        (["--device", "cpu", "--trace-memory"], "--trace-memory reads the history of a GPU's allocator"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_usage_error(["bench", "train", *arguments], message, capsys)
