"""What the kernel tests share: random layers, devices, and errors against float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from ternarize import ops
from ternarize.packing import groups_per_row, pack

#: Backends and devices: everything runs on the CPU (Triton in its interpreter) and, where there is one, on a GPU.
BACKENDS = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param(
        "triton",
        "cpu",
        id="triton-cpu",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here: the gpu tests cover it"),
    ),
    pytest.param("torch", "cuda", id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]

#: Where a Triton kernel runs that no op stands before.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

#: Relative error against float64 that a result rounded to this dtype may have.
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 5e-4, torch.float32: 1e-5}


def skip_unless_triton_runs(device: str) -> None:
    """Skip a test on the CPU where Triton compiles instead of interpreting."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton compiles here: it cannot run on the CPU")


@dataclasses.dataclass
class Weights:
    """Arguments of `linear` and `grad_input` for one layer."""

    T_packed: Tensor
    E: Tensor
    E_mantissa: Tensor | None
    bias: Tensor | None
    bias_exponent: Tensor | None


def random_weights(
    N: int,
    K: int,
    group_size: int,
    *,
    planes: int = 1,
    mantissa: bool = False,
    bias: bool = False,
    exponents: tuple[int, int] = (-4, 2),
    device: str = "cpu",
) -> Weights:
    """Uniform trits; exponents uniform between two ends, both included."""
    T = torch.randint(-1, 2, (N, K) if planes == 1 else (planes, N, K), dtype=torch.int8)
    groups = groups_per_row(K, group_size)
    E = torch.randint(exponents[0], exponents[1] + 1, (N, groups), dtype=torch.int8)
    return Weights(
        pack(T, group_size).to(device),
        E.to(device),
        torch.randint(128, 256, (N, groups), dtype=torch.int16).to(device) if mantissa else None,
        torch.randint(-(2**31), 2**31 - 1, (N,), dtype=torch.int32).to(device) if bias else None,
        torch.tensor([-30], dtype=torch.int8, device=device) if bias else None,
    )


def linear(backend: str, x: Tensor, layers: list[Weights], group_size: int) -> list[Tensor]:
    """The lowered op of a backend."""
    arguments = (
        x,
        [w.T_packed for w in layers],
        [w.E for w in layers],
        [w.E_mantissa for w in layers],
        [w.bias for w in layers],
        [w.bias_exponent for w in layers],
        group_size,
    )
    outputs: list[Tensor] = ops.lowered("linear", backend)(*ops.with_status("linear", backend, arguments))
    return outputs


def linear_int8(
    backend: str, q: Tensor, scale: Tensor, layers: list[Weights], group_size: int, dtype: torch.dtype
) -> list[Tensor]:
    """The lowered op of a backend."""
    arguments = (
        q,
        scale,
        [w.T_packed for w in layers],
        [w.E for w in layers],
        [w.E_mantissa for w in layers],
        [w.bias for w in layers],
        [w.bias_exponent for w in layers],
        group_size,
        dtype,
    )
    outputs: list[Tensor] = ops.lowered("linear_int8", backend)(*ops.with_status("linear_int8", backend, arguments))
    return outputs


def grad_input(backend: str, grad_y: list[Tensor], layers: list[Weights], in_features: int, group_size: int) -> Tensor:
    """The lowered op of a backend."""
    op = getattr(torch.ops.ternarize, f"grad_input_{backend}")
    grad_x: Tensor = op(
        grad_y,
        [w.T_packed for w in layers],
        [w.E for w in layers],
        [w.E_mantissa for w in layers],
        in_features,
        group_size,
    )
    return grad_x


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """Relative error in the 2-norm within `TOLERANCE`, for float64 ``exact``."""
    assert actual.shape == exact.shape
    difference, norm = (actual.double() - exact).norm(), exact.norm()
    # Few numbers may all be rounded the unlucky way: what rounding the exact result costs is always allowed.
    rounding = (exact.to(actual.dtype).double() - exact).norm() / norm.clamp_min(torch.finfo(torch.float64).tiny)
    allowed = max(TOLERANCE[actual.dtype], 1.02 * float(rounding))
    assert torch.isfinite(actual).all()
    assert difference <= allowed * norm, f"relative error {float(difference / norm):.2e} is above {allowed:.1e}"
