import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

from ternarize import ternarize
from ternarize.cli import FAILURE, OK, USAGE, main
from ternarize.cli import smoke as verb
from ternarize.smoke.measure import measure
from ternarize.smoke.model import SmokeModel

EAGER = ["smoke", "--device", "cpu", "--ctx", "8", "--batch", "2", "--no-compile", "--json"]


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    # What is vectorised takes the C++ compiler longest.
    with inductor_config.patch({"cpp.simdlen": 1}):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("blocks", [[], ["--no-vq", "--no-moe"], ["--no-graph", "--max-moe-iters", "4"]])
def test_smoke_trains_with_a_finite_loss_on_integers(blocks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EAGER, "--backward", *blocks]) == OK
    report = json.loads(capsys.readouterr().out)
    run = report["runs"]["eager"]
    assert run["finite"]
    assert math.isfinite(run["loss"])
    for part in ("forward", "backward_update"):
        assert run[part]["cold"] > 0
        assert run[part]["warm"] > 0
    assert report["float_state"]["trainable_parameters"] > 0
    assert report["float_state"]["in_ternary_parameters"] == report["float_state"]["in_ternary_buffers"] == 0
    assert report["blocks"] == {
        "vq": "--no-vq" not in blocks,
        "graph": "--no-graph" not in blocks,
        "moe": "not built in this release",
    }


def test_smoke_prints_times_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EAGER[:-1]]) == OK
    out = capsys.readouterr().out
    for words in (
        "forward, cold",
        "forward, warm",
        "finite",
        "moe: not built in this release",
        "inside ternary layers: 0 float parameters, 0 float buffers",
    ):
        assert words in out
    assert "backward" not in out


def test_a_loss_that_is_not_finite_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: bool) -> nn.Module:
        model = SmokeModel(**options)
        nn.init.constant_(model.embed.weight, torch.inf)
        return model

    monkeypatch.setattr(verb, "SmokeModel", broken)
    assert main([*EAGER, "--backward"]) == FAILURE
    report = json.loads(capsys.readouterr().out)
    assert report["runs"]["eager"]["loss"] is None


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU refuses")
def test_compare_runs_what_can_run_and_says_why_the_rest_cannot(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    call = ["smoke", "--device", "cpu", "--ctx", "8", "--batch", "2", "--no-vq", "--no-graph", "--compare", "--json"]
    assert main(call) == OK
    report = json.loads(capsys.readouterr().out)
    assert list(report["runs"]) == ["auto", "torch"]
    assert report["runs"]["torch"]["kernels"] == {"torch": 4}
    assert report["runs"]["torch"]["loss"] == pytest.approx(report["runs"]["auto"]["loss"])
    assert "the tensors are on cpu" in report["refused"]["tilelang"]
    assert "the tensors are on the CPU" in report["refused"]["triton"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ctx", "0"], "--ctx is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--compare", "--no-compile"], "drop --no-compile"),
    ],
)
def test_a_wrong_call_of_smoke_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["smoke", *arguments]) == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_kernels_are_those_of_the_optimizer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # It would be an error here: Triton needs a GPU, or its interpreter.
    monkeypatch.setenv("TERNARIZE_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = ternarize(SmokeModel(features=64, vq=False, graph=False))
    tokens = torch.randint(256, (1, 9))
    assert measure(model, tokens, backward=True, compiled=False, kernels="torch").finite


def test_no_token_sees_a_later_one() -> None:
    torch.manual_seed(0)
    model = SmokeModel(features=64)
    tokens = torch.randint(256, (1, 13))
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    for last in (3, 4):
        tokens[0, 8] = last
        model(tokens)
    assert torch.equal(logits[0][:, :8], logits[1][:, :8])
    assert not torch.equal(logits[0][:, 8:], logits[1][:, 8:])
