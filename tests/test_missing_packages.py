"""Without Triton or TileLang everything else runs on, and `explain` says what is missing."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

EXPLAIN = """
import logging, torch
from ternarize import TernaryConfig, TernaryLinear, explain

logging.basicConfig(format="%(message)s")
model = torch.nn.Sequential(TernaryLinear(256, 128, config=TernaryConfig()))
model.to(DEVICE, torch.bfloat16)
compiled = torch.compile(model, backend="ternary", fullgraph=True, options=dict(kernels=KERNELS))
with torch.no_grad():
    y = compiled(torch.ones(3, 256, device=DEVICE, dtype=torch.bfloat16))
assert y.eq(0).all()
print(explain(compiled))
"""


def run_without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.without", packages, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def explained(packages: str, device: str, kernels: str = "auto") -> str:
    result = run_without(packages, "-c", f"DEVICE, KERNELS = {device!r}, {kernels!r}\n{EXPLAIN}")
    return result.stdout.strip() if result.returncode == 0 else result.stderr


def test_what_needs_neither_runs_without_both() -> None:
    tests = ("tests/test_layer.py", "tests/passes/test_lower_ternary.py")
    # What forces Triton says so by name.
    result = run_without("triton,tilelang", "-q", "-p", "no:cacheprovider", "-k", "not triton", *tests)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "passed" in result.stdout


def test_a_cpu_falls_back_to_torch() -> None:
    assert explained("triton,tilelang", "cpu").startswith("0 (inference): torch: not tilelang: the tensors are on cpu")


def test_a_forced_kernel_names_what_is_missing() -> None:
    assert "kernels=triton cannot run linear: triton is not installed" in explained("triton,tilelang", "cpu", "triton")


# One layer: Inductor itself generates Triton on a GPU, and compiles nothing else there without it.
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("packages", "kernel"),
    [
        ("tilelang", "triton: not tilelang: the package tilelang is not installed"),
        ("triton", "tilelang: TileLang runs on Hopper"),
        (
            "triton,tilelang",
            "torch: not tilelang: the package tilelang is not installed; not triton: triton is not installed",
        ),
    ],
)
def test_a_gpu_falls_back_to_what_is_there(packages: str, kernel: str) -> None:
    assert explained(packages, "cuda") == f"0 (inference): {kernel}"
