"""Which backend runs a call: the table of README.md, with verifiers that say what the test wants."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from ternarize.backends import select
from ternarize.backends.select import Choice, Facts, Phase, choose
from ternarize.config import Kernels
from ternarize.errors import KernelError

ON_GPU = Facts(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    in_features=128,
    out_features=(64,),
    planes=(1,),
    group_size=128,
    mantissas=(None,),
)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of backends whose verifier refuses; the others accept."""
    refused: set[str] = set()
    monkeypatch.setattr(select, "verify", lambda backend, *_: (backend not in refused, f"{backend} says so"))
    select._choose.cache_clear()
    select._say_once.cache_clear()
    yield refused
    select._choose.cache_clear()


@pytest.mark.parametrize(
    ("phase", "refused", "backend"),
    [
        ("inference", set(), "tilelang"),
        ("inference", {"tilelang"}, "triton"),
        ("inference", {"tilelang", "triton"}, "torch"),
        ("training", set(), "triton"),
        ("training", {"triton"}, "torch"),
    ],
)
def test_auto_takes_the_first_that_can(refusing: set[str], phase: Phase, refused: set[str], backend: str) -> None:
    refusing |= refused
    choice = choose("linear", phase, ON_GPU, "auto")
    assert choice.backend == backend
    assert all(f"not {name}: {name} says so" in choice.reason for name in refused)


@pytest.mark.parametrize("phase", ["inference", "training"])
@pytest.mark.parametrize("policy", ["tilelang", "triton", "torch"])
def test_a_forced_backend_is_taken_or_raises(
    refusing: set[str], phase: Phase, policy: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERNARIZE_TILELANG_TRAINING", "1")
    assert choose("linear", phase, ON_GPU, policy) == Choice(policy, f"{policy} says so")
    select._choose.cache_clear()
    refusing.add(policy)
    with pytest.raises(KernelError, match=f"kernels={policy} cannot run linear: {policy} says so; use auto"):
        choose("linear", phase, ON_GPU, policy)


def test_tilelang_trains_only_behind_its_gate_and_leaves_to_triton_what_it_has_no_kernels_for(
    refusing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KernelError, match="set TERNARIZE_TILELANG_TRAINING=1"):
        choose("linear", "training", ON_GPU, "tilelang")
    monkeypatch.setenv("ARB_TILELANG_TRAINING", "1")
    assert choose("linear", "training", ON_GPU, "tilelang").backend == "tilelang"
    assert choose("update_stage", "training", ON_GPU, "tilelang").backend == "tilelang"
    assert choose("update_apply", "training", ON_GPU, "tilelang").backend == "tilelang"
    for stem in ("grad_input", "update_commit"):
        reason = f"there is no TileLang kernel for {stem}; triton says so"
        assert choose(stem, "training", ON_GPU, "tilelang") == Choice("triton", reason)
    refusing.add("tilelang")
    select._choose.cache_clear()
    with pytest.raises(KernelError, match="kernels=tilelang cannot run update_stage: tilelang says so"):
        choose("update_stage", "training", ON_GPU, "tilelang")


def test_a_cpu_gets_the_reference(refusing: set[str]) -> None:
    on_cpu = dataclasses.replace(ON_GPU, device="cpu", capability=(0, 0))
    assert choose("linear", "inference", on_cpu, "auto").backend == "torch"


def test_a_layer_off_tilelang_falls_through(refusing: set[str]) -> None:
    choice = choose("linear", "inference", ON_GPU, "auto", tilelang=False)
    assert choice.backend == "triton"
    assert "not finite earlier" in choice.reason


def test_falling_through_on_a_gpu_is_said_once(refusing: set[str], caplog: pytest.LogCaptureFixture) -> None:
    refusing.add("tilelang")
    for tokens in (64, 32):
        choose("linear", "inference", dataclasses.replace(ON_GPU, out_features=(tokens,)), "auto")
    assert [record.getMessage() for record in caplog.records] == ["linear: triton, not tilelang: tilelang says so"]
    assert caplog.records[0].levelname == "WARNING"
