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


EAGER = """
import logging, torch
from ternarize import TernaryConfig, TernaryLinear

logging.basicConfig(format="%(message)s")
layer = TernaryLinear(256, 128, config=TernaryConfig()).to("cuda", torch.bfloat16)
with torch.no_grad():
    assert layer(torch.ones(3, 256, device="cuda", dtype=torch.bfloat16)).eq(0).all()
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


@pytest.mark.gpu
def test_a_gpu_without_tilelang_falls_back_to_triton() -> None:
    reason = "triton: not tilelang: the package tilelang is not installed"
    assert explained("tilelang", "cuda") == f"0 (inference): {reason}"


@pytest.mark.gpu
@pytest.mark.parametrize("packages", ["triton", "triton,tilelang"])
def test_a_gpu_without_triton_runs_eagerly(packages: str) -> None:
    result = run_without(packages, "-c", EAGER)
    assert result.returncode == 0, result.stderr
    assert "not triton: triton is not installed" in result.stderr
    # Inductor compiles nothing for a GPU then.
    assert "TritonMissing" in explained(packages, "cuda")
