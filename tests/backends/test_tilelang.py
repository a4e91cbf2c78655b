"""What the TileLang backend takes, and what it says to the rest."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ternarize.backends import tilelang as backend
from ternarize.backends.select import Facts
from ternarize.packing import ROW

pytest.importorskip("tilelang", reason="TileLang is for Linux")

FACTS = Facts(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    in_features=4096,
    out_features=(4096, 333),
    planes=(1, 1),
    group_size=128,
    mantissas=(None, None),
)


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA_HOME with an nvcc in it, whatever the machine has."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return compiler


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.float16},
        {"group_size": 32, "in_features": 576},
        {"group_size": 64, "in_features": 576},
        # The last group of 64.
        {"group_size": 128, "in_features": 576},
        {"group_size": 256},
        {"group_size": 512, "in_features": 64},
        {"group_size": ROW},
        {"planes": (3, 3)},
        {"mantissas": (torch.uint8, torch.uint8)},
    ],
)
def test_verify_accepts_what_the_kernel_runs(nvcc: Path, change: dict[str, Any]) -> None:
    ok, reason = backend.verify("linear", dataclasses.replace(FACTS, **change))
    assert ok, reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu", "capability": (0, 0)}, "the tensors are on cpu, need cuda"),
        ({"capability": (8, 6)}, "the GPU has compute capability 8.6, need 9.0 (Hopper)"),
        ({"capability": (10, 0)}, "the GPU has compute capability 10.0, need 9.0 (Hopper)"),
        ({"dtype": torch.float32}, "the activations are torch.float32, need torch.bfloat16 or torch.float16"),
        ({"planes": (1, 3)}, "layers of one call have 1 and 3 trit planes"),
        ({"mantissas": (None, torch.int16)}, "layers of one call have E_mantissa of None and torch.int16"),
        ({"group_size": 96}, "group_size is 96, need 32, 64, a multiple of 128 or whole rows"),
        ({"group_size": 192}, "group_size is 192, need 32, 64, a multiple of 128 or whole rows"),
        ({"in_features": 96}, "in_features is 96, need a multiple of 64: rows of 16 bytes for TMA"),
    ],
)
def test_verify_says_what_it_got_and_what_it_needs(nvcc: Path, change: dict[str, Any], reason: str) -> None:
    assert backend.verify("linear", dataclasses.replace(FACTS, **change)) == (False, reason)


UPDATE = dataclasses.replace(FACTS, in_features=40, out_features=(4096, 328), mantissas=(), rule="factored")


@pytest.mark.parametrize("stem", ["update_stage", "update_apply"])
def test_verify_accepts_an_update_of_factored(nvcc: Path, stem: str) -> None:
    for change in ({}, {"dtype": torch.float16}, {"group_size": 12}):
        ok, reason = backend.verify(stem, dataclasses.replace(UPDATE, **change))
        assert ok, reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (10, 0)}, "the GPU has compute capability 10.0, need 9.0 (Hopper)"),
        ({"dtype": torch.float32}, "the activations are torch.float32, need torch.bfloat16 or torch.float16"),
        ({"rule": "sign"}, "the rule is sign, need factored"),
        ({"trains_exponents": True}, "exponents are trained, need train_exponents=False"),
        (
            {"in_features": 60, "out_features": (8, 333)},
            "the layers have in_features 60, out_features 333, need multiples of 8: rows of 16 bytes for TMA",
        ),
    ],
)
def test_verify_says_what_an_update_needs(nvcc: Path, change: dict[str, Any], reason: str) -> None:
    assert backend.verify("update_stage", dataclasses.replace(UPDATE, **change)) == (False, reason)


def test_verify_refuses_other_ops(nvcc: Path) -> None:
    assert backend.verify("grad_input", FACTS) == (
        False,
        "there is no TileLang kernel for grad_input",
    )


def test_verify_refuses_without_tilelang(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.verify("linear", FACTS) == (False, "the package tilelang is not installed")


def test_verify_refuses_without_nvcc(nvcc: Path) -> None:
    nvcc.unlink()
    ok, reason = backend.verify("linear", FACTS)
    assert not ok
    assert "nvcc" in reason
