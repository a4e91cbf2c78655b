"""Training on a GPU: Triton's kernels against the torch reference, and runs of `ternarize train`."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ternarize.config import Accumulator, Rule
from ternarize.train.checkpoint import load_checkpoint
from ternarize.train.determinism import deterministic_algorithms
from ternarize.train.loop import train
from ternarize.train.model import builtin_config
from ternarize.train.run import RunFolder, Source, start
from ternarize.train.settings import TrainSettings
from tests.backends import kit
from tests.backends.test_update import assert_equal, commit, integers, random_layer, stage

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

for_every_form = pytest.mark.parametrize(
    ("rule", "accumulator"), [("factored", "int8"), ("factored", "int4"), ("sign", "int8")]
)


@for_every_form
@pytest.mark.parametrize(("N", "K", "group_size"), [(5, 130, 32), (70, 64, -1)])
def test_cuda_triton_correctness_update_E(
    rule: Rule, accumulator: Accumulator, N: int, K: int, group_size: int
) -> None:
    layer = random_layer(N, K, group_size, rule, accumulator, DEVICE, train_exponents=True)
    expected, before = copy.deepcopy(layer), layer.E.clone()
    for _ in range(4):
        x, grad_y = integers(6, K, device=DEVICE), integers(6, N, device=DEVICE)
        for backend, each in (("triton", layer), ("torch", expected)):
            stage(backend, [each], [grad_y], x)
            commit(backend, each)
            each.rng[2] += 1
        assert_equal(layer, expected)
    assert not torch.equal(layer.E, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("N", "K", "group_size"), [(96, 256, 64), (33, 130, 32), (16, 100, -1)])
def test_cuda_triton_tscale_path(dtype: torch.dtype, N: int, K: int, group_size: int) -> None:
    torch.manual_seed(0)
    weights = kit.random_weights(N, K, group_size, exponents=(-6, 2), device=DEVICE)
    x, grad_y = (torch.randn(40, features, device=DEVICE).to(dtype) for features in (K, N))
    args = (weights.T_packed, weights.E, None, K, group_size, torch.float64)
    dense = torch.ops.ternarize.dequantize(*args)
    (y,) = kit.linear("triton", x, [weights], group_size)
    kit.assert_close(y, x.double() @ dense.t())
    grad_x = kit.grad_input("triton", [grad_y], [weights], K, group_size)
    kit.assert_close(grad_x, grad_y.double() @ dense)


@for_every_form
def test_cuda_triton_correctness_ternary_step(
    rule: Rule, accumulator: Accumulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(70, 130, 32, rule, accumulator, DEVICE)
    # Outputs in range: the ends of E are the other tests' matter.
    layer.E.fill_(0)
    before, expected = copy.deepcopy(layer), copy.deepcopy(layer)
    for _ in range(3):
        x, grad_y = integers(8, 130, device=DEVICE), integers(8, 70, device=DEVICE)
        outputs = []
        for backend, each in (("triton", layer), ("torch", expected)):
            monkeypatch.setenv("TERNARIZE_BACKEND", backend)
            y = each(x)
            y.backward(grad_y)
            commit(backend, each)
            each.rng[2] += 1
            outputs.append(y.detach())
        # Sums of small integers are exact in any order.
        assert torch.equal(*outputs)
        assert_equal(layer, expected)
    assert not torch.equal(layer.get_parameter("T_accum"), before.get_parameter("T_accum"))


def _run(path: Path, settings: TrainSettings, *, stop_after: int | None = None, resume: bool = False) -> None:
    text = path.parent / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)), encoding="utf-8")
    folder = RunFolder(path)

    def model_config(vocabulary: int) -> Any:
        return builtin_config(hidden=128, layers=2, ctx=settings.ctx, vocabulary=vocabulary)

    def crash(record: Any) -> None:
        assert math.isfinite(record.loss)
        if record.step == stop_after:
            raise RuntimeError("crash")

    with deterministic_algorithms(True):
        trainer = start(
            folder,
            settings,
            Source(texts=(text,)),
            model_config,
            device=torch.device(DEVICE),
            compiled=True,
            resume=resume,
        )
        train(trainer, checkpoint=folder.checkpoint, log=folder.log, save_every=3, eval_every=100, on_step=crash)


@pytest.mark.parametrize("rule", ["factored", "ste", "dense"])
def test_a_compiled_run_resumes_bit_for_bit(rule: str, tmp_path: Path) -> None:
    settings = dataclasses.replace(TrainSettings(ctx=64, batch=8, accum=2, steps=6, warmup=2), rule=rule)  # type: ignore[arg-type]
    counters.clear()
    _run(tmp_path / "whole", settings)
    # Its later steps are replays, the first ones of the resumed run are not.
    assert "cudagraph_recorded_non_static_inputs" in counters["inductor"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    with pytest.raises(RuntimeError, match="crash"):
        _run(tmp_path / "run", settings, stop_after=4)
    torch._dynamo.reset()
    _run(tmp_path / "run", settings, resume=True)
    states = [load_checkpoint(RunFolder(tmp_path / name).checkpoint) for name in ("run", "whole")]
    torch.testing.assert_close(*states, rtol=0, atol=0)
