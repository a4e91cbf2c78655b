import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from ternarize.bench import llama, step
from ternarize.bench.llama import SHAPES, layers_that_fit, model_config, random_model
from ternarize.bench.model import Plan, Result, measure_batch
from ternarize.bench.process import ContenderError, Process
from ternarize.bench.step import Contender, Task, Work
from ternarize.bench.timing import MIN_ROUNDS
from ternarize.bench.turns import times_dense
from ternarize.checkpoint.transformers_model import empty_model
from ternarize.cli import FAILURE, INTERRUPTED, OK, bench_model, main
from ternarize.config import TernaryConfig
from ternarize.errors import ConfigError
from ternarize.layer import ternary_layers
from ternarize.packing import has_illegal_code
from tests.bench_kit import CPU, TINY, Local, assert_usage_error, interrupt_at

TERNARY = TernaryConfig(group_size=32)

measure_locally = functools.partial(measure_batch, start=functools.partial(Local, Contender))

Step = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


def plan(work: Work = "decode", **changes: Any) -> Plan:
    defaults: dict[str, Any] = {
        "work": work,
        "config": TINY,
        "contenders": {"dense": (None, "auto"), "ternary auto": (TERNARY, "auto")},
        "prompt": 7,
        "new_tokens": 3,
        "dtype": torch.bfloat16,
        "device": CPU,
        "seconds": 0.0,
        "start_times": False,
    }
    return Plan(**(defaults | changes))


def compile_nothing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Step], Step] = lambda step: step) -> None:
    """Leave dense steps as they are, and ternary ones but for a change."""
    monkeypatch.setattr(step, "compile_step", lambda run, kernels: run if kernels is None else change(run))


# Models.


def test_shapes_have_the_sizes_of_their_namesakes() -> None:
    billions = {"smol": 0.1345, "1b": 1.2358, "8b": 8.0303, "70b": 70.5537}
    assert set(billions) == set(SHAPES)
    for name, number in billions.items():
        parameters = empty_model(SHAPES[name]).parameters()
        assert sum(parameter.numel() for parameter in parameters) / 1e9 == pytest.approx(number, abs=5e-5)


def test_a_ternary_model_is_frozen_integers_and_a_dense_head() -> None:
    model = random_model(TINY, TernaryConfig(group_size=32, planes=2), dtype=torch.bfloat16, device=CPU)
    layers = dict(ternary_layers(model))
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        assert layer.name == name
        assert not layer.trainable
        assert not has_illegal_code(layer.T_packed)
        assert len(layer.E.unique()) == 3
        x = torch.randn(64, layer.in_features)
        assert layer(x).std() == pytest.approx(llama.GAIN, rel=0.5)
    assert type(model.get_submodule("lm_head")) is nn.Linear
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_models_are_the_same_each_time() -> None:
    first, second = (random_model(TINY, TERNARY, dtype=torch.bfloat16, device=CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_heads_in_groups_attend_as_transformers_has_them() -> None:
    model: Any = random_model(TINY, None, dtype=torch.float32, device=CPU)
    tokens = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for attend in (lambda _: None, llama.attend_in_groups):
        cache = StaticCache(config=model.config, max_cache_len=12)
        with torch.no_grad():
            model(tokens[:, :-1], past_key_values=cache, use_cache=True)
            attend(model)
            logits.append(model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*logits)


def test_a_shape_is_a_name_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    assert model_config(str(file)) == TINY
    assert model_config("8b")["intermediate_size"] == 14336
    with pytest.raises(ConfigError, match="none of smol, 1b, 8b, 70b"):
        model_config("9b")
    file.write_text('{"num_hidden_layers": "two"}')
    with pytest.raises(ConfigError, match="has no number num_hidden_layers: give the config"):
        model_config(str(file))


def test_layers_fit_that_all_contenders_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "OVERHEAD_BYTES", 0)
    # 2 * 32 * (32 + 16) + 3 * 32 * 96 weights and two norms; an embedding, the head and a norm.
    in_layer, elsewhere = 12288 + 64, 64 * 32 + 32
    models = (None, TernaryConfig(group_size=32))
    needed = 2 * (2 * elsewhere) + 5 * in_layer * (16 + 2.25) / 8
    config = TINY | {"num_hidden_layers": 9}
    assert layers_that_fit(config, models, torch.bfloat16, math.ceil(needed)) == 5
    assert layers_that_fit(config, models, torch.bfloat16, math.floor(needed) - 1) == 4
    assert layers_that_fit(config, models, torch.bfloat16, 10**9) == 9
    with pytest.raises(ConfigError, match="not one layer fits"):
        layers_that_fit(config, models, torch.bfloat16, 10**4)


# Contenders.


@pytest.mark.parametrize(("work", "tokens"), [("decode", 2), ("prefill", 14)])
def test_all_are_checked_and_timed_in_turns(monkeypatch: pytest.MonkeyPatch, work: Work, tokens: int) -> None:
    compile_nothing(monkeypatch)
    asked: list[tuple[str, str]] = []

    class Logged(Local):
        def ask(self, method: str) -> None:
            super().ask(method)
            asked.append(("dense" if self.task.ternary is None else "ternary", method))

    results = measure_batch(plan(work), 2, functools.partial(Logged, Contender))
    assert [(result.contender, result.status, result.reason) for result in results] == [
        ("dense", "ok", ""),
        ("ternary auto", "ok", ""),
    ]
    assert asked[:2] == [("dense", "prepare"), ("ternary", "prepare")]
    assert asked[2 : 2 + 2 * MIN_ROUNDS] == [("dense", "run"), ("ternary", "run")] * MIN_ROUNDS
    for result in results:
        assert result.tokens == tokens
        assert result.seconds is not None
        assert result.ready is not None
        assert 1e-4 < result.ready.error <= result.ready.allowed_error < 0.1
        assert not result.ready.cuda_graph
        assert result.cold_seconds is None
    dense, ternary = results
    assert times_dense(ternary, results) == dense.seconds / ternary.seconds  # type: ignore[operator]


def scaled(run: Step) -> Step:
    def wrong(tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        next_tokens, logits = run(tokens, cache)
        return next_tokens, logits * 1.1

    return wrong


def lost_key(run: Step) -> Step:
    def wrong(tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        outputs = run(tokens, cache)
        cache.layers[-1].keys[:, :, 7] = 0
        return outputs

    return wrong


def not_finite(run: Step) -> Step:
    def wrong(tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        next_tokens, logits = run(tokens, cache)
        return next_tokens, logits.index_fill(-1, torch.tensor(3), torch.nan)

    return wrong


@pytest.mark.parametrize("change", [scaled, lost_key, not_finite], ids=["logits", "cache", "nan"])
def test_a_wrong_step_gets_no_time(monkeypatch: pytest.MonkeyPatch, change: Callable[[Step], Step]) -> None:
    compile_nothing(monkeypatch, change)
    dense, wrong = measure_locally(plan(), 2)
    assert dense.status == "ok"
    assert (wrong.status, wrong.seconds) == ("wrong", None)
    assert wrong.reason.startswith("in the first calls: relative error")


def test_a_step_that_turns_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def turning(run: Step) -> Step:
        def step(tokens: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
            nonlocal calls
            calls += 1
            return (scaled(run) if calls > 20 else run)(tokens, cache)

        return step

    compile_nothing(monkeypatch, turning)
    _, wrong = measure_locally(plan(), 2)
    assert (wrong.status, wrong.seconds) == ("wrong", None)
    assert "after the timed calls" in wrong.reason


def test_a_step_that_raises_is_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Step) -> Step:
        raise RuntimeError("out of registers")

    compile_nothing(monkeypatch, broken)
    dense, failed = measure_locally(plan(), 2)
    assert (dense.status, failed.status, failed.reason) == ("ok", "failed", "out of registers")
    assert failed.ready is None


def test_starts_are_timed_with_caches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    started: list[Local] = []

    def start(task: Task, caches: Path | None) -> Local:
        assert caches is not None
        assert caches.parent.is_dir()
        started.append(Local(Contender, task, caches))
        return started[-1]

    results = measure_batch(plan(start_times=True), 1, start)
    assert all((result.cold_seconds or 0) > 0 < (result.prewarmed_seconds or 0) for result in results)
    dense, ternary, *again = [remote.caches for remote in started]
    assert dense != ternary
    assert again == [dense, ternary]


def test_an_interrupt_of_a_second_start_keeps_all_that_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    monkeypatch.setattr(Contender, "prepare", interrupt_at(4, Contender.prepare))
    for result, prewarmed in zip(measure_locally(plan(start_times=True), 1), (True, False), strict=True):
        assert (result.status, result.interrupted) == ("ok", True)
        assert (result.rounds, result.seconds is not None) == (MIN_ROUNDS, True)
        assert (result.cold_seconds is not None, result.prewarmed_seconds is not None) == (True, prewarmed)


def test_the_check_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_nothing(monkeypatch)
    monkeypatch.setenv("TERNARIZE_BACKEND", "auto")
    contender = Contender(plan().task("ternary auto", 1))
    before = {name: tensor.clone() for name, tensor in contender._model.state_dict().items()}
    contender.prepare()
    after = contender._model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in contender._model.modules())
    assert os.environ["TERNARIZE_BACKEND"] == "auto"
    assert "ARB_TERNARY_BACKEND" not in os.environ


def test_a_ternary_step_compiles_to_one_graph() -> None:
    contender = Contender(plan(config=TINY | {"num_hidden_layers": 1}).task("ternary auto", 2))
    ready = contender.prepare()
    assert ready.error <= ready.allowed_error
    assert ready.kernels == {"torch": 7}
    assert contender.run().seconds > 0
    assert contender.check() == ""


def test_a_process_tells_what_went_wrong() -> None:
    remote = Process(Contender, plan(config={"model_type": "none such", "vocab_size": 1}).task("dense", 1))
    remote.ask("prepare")
    with pytest.raises(ContenderError, match="has no model_type 'none such'"):
        remote.answer()
    remote._process.kill()
    remote._process.join()
    remote.ask("prepare")
    with pytest.raises(ContenderError, match="ended with code -9"):
        remote.answer()
    remote.close()


# The command.


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    compile_nothing(monkeypatch)
    monkeypatch.setattr(bench_model, "measure_batch", measure_locally)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return ["--model", str(file), "--prompt", "5", "--group-size", "32", "--seconds", "0"]


def test_bench_decode_reports_every_contender(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--new-tokens", "2", "--batch", "1,3", "--layers", "1", "--kernels", "auto,torch", "--json"]
    assert main(["bench", "decode", *tiny, *more]) == OK
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == (
        f"ternarize bench decode --model {tiny[1]} --layers 1 --batch 1,3 --prompt 5 --new-tokens 2 "
        "--kernels auto,torch --activation float --group-size 32 --planes 1 --dtype bfloat16 --seconds 0"
    )
    cells = {(cell["batch"], cell["contender"]): cell for cell in report["cells"]}
    assert list(cells) == [(b, name) for b in (1, 3) for name in ("dense", "ternary auto", "ternary torch")]
    cell = cells[3, "ternary torch"]
    assert cell["tokens_per_second"] == pytest.approx(3000 / cell["milliseconds"])
    assert cell["times_dense"] == pytest.approx(cells[3, "dense"]["milliseconds"] / cell["milliseconds"])
    assert cell["error"] <= cell["allowed_error"]


def test_bench_prefill_prints_a_table(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefill", *tiny]) == OK
    out = capsys.readouterr().out
    for words in ("prefill, batch 1, 5 tokens read", "tokens/s", "ternary auto", "no CUDA graph"):
        assert words in out


def test_an_interrupt_in_the_timed_rounds_keeps_them(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Contender, "run", interrupt_at(5, Contender.run))
    assert main(["bench", "decode", *tiny, "--batch", "1,3", "--json"]) == INTERRUPTED
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["ok"], report["error"]) == (False, "interrupted")
    # The third round, in which it came, is the last one.
    found = [(cell["batch"], cell["contender"], cell["status"], cell["rounds"]) for cell in report["cells"]]
    assert found == [(1, "dense", "ok", 3), (1, "ternary auto", "ok", 3)]
    assert all(cell["milliseconds"] > 0 for cell in report["cells"])
    assert "batch 1 was cut short, rounds of timing: 3" in captured.err


@pytest.mark.parametrize("calls", [(1,), (2,), (5, 5)], ids=["first round", "its second half", "two at once"])
def test_an_interrupt_in_the_first_round_and_a_second_one_leave_no_time(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...]
) -> None:
    for call in calls:
        monkeypatch.setattr(Contender, "run", interrupt_at(call, Contender.run))
    assert main(["bench", "decode", *tiny, "--json"]) == INTERRUPTED
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["status"], cell["reason"]) for cell in cells] == [("failed", "interrupted")] * 2
    assert not any("milliseconds" in cell for cell in cells)


def test_an_interrupt_of_a_later_batch_keeps_the_finished_ones(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["bench", "decode", *tiny, "--batch", "1,3,5"]
    with monkeypatch.context() as patch:
        patch.setattr(Contender, "prepare", interrupt_at(4, Contender.prepare))
        assert main([*call, "--json"]) == INTERRUPTED
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["batch"], cell["status"], cell["reason"]) for cell in cells] == [
        (1, "ok", ""),
        (1, "ok", ""),
        (3, "failed", "interrupted"),
        (3, "failed", "interrupted"),
    ]
    assert ["error" in cell for cell in cells] == [True, True, True, False]
    monkeypatch.setattr(Contender, "prepare", interrupt_at(4, Contender.prepare))
    assert main(call) == INTERRUPTED
    captured = capsys.readouterr()
    for words in ("decode, batch 1", "decode, batch 3", "ternary auto: failed: interrupted"):
        assert words in captured.out
    assert captured.err.endswith("ternarize: error: interrupted\n")


def test_a_wrong_model_fails_the_run(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_nothing(monkeypatch, not_finite)
    assert main(["bench", "prefill", *tiny, "--json"]) == FAILURE
    dense, wrong = json.loads(capsys.readouterr().out)["cells"]
    assert (dense["status"], wrong["status"], wrong["error"]) == ("ok", "wrong", None)
    assert "milliseconds" not in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "some"], "'some' is no positive number"),
        (["--prompt", "1,2"], "'1,2' is no positive number"),
        (["--kernels", "cuda"], "'cuda' is not among kernels"),
        (["--activation", "int4"], "'int4' is not among activations"),
        (["--group-size", "3"], "group_size 3 is not a positive multiple of 4"),
        (["--model", "9b"], "--model '9b'"),
        (["--layers", "fit"], "there is none: give a number"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="--layers fit works with a GPU")
def test_a_wrong_call_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_usage_error(["bench", "decode", *arguments], message, capsys)


def test_times_dense_needs_both_times() -> None:
    dense = Result(contender="dense", batch=1, tokens=1, seconds=3.0)
    ternary = Result(contender="ternary auto", batch=1, tokens=1, seconds=2.0)
    assert times_dense(ternary, [dense, ternary]) == 1.5
    assert times_dense(ternary, [ternary]) is None
