import itertools

import pytest
import torch

from ternarize.backends.select import Facts
from ternarize.backends.triton import verify
from tests.backends.kit import BACKENDS, TOLERANCE, Weights, assert_close, linear, random_weights

on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def exact(x: torch.Tensor, layers: list[Weights], group_size: int) -> list[torch.Tensor]:
    return linear("torch", x.double(), layers, group_size)


@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [1, 3, 130, 576])
@pytest.mark.parametrize("N", [1, 5, 192])
def test_linear_equals_float64_at_odd_shapes(backend: str, device: str, dtype: torch.dtype, K: int, N: int) -> None:
    torch.manual_seed(K + N)
    # Group sizes and planes go round over the shapes: each of them meets small and large ones.
    group_size = (32, 64, 128, -1)[(K + N) % 4]
    layer = random_weights(N, K, group_size, planes=1 + K % 3, bias=N % 2 == 1, device=device)
    x = torch.randn(2, 3, K, device=device).to(dtype)
    (y,) = linear(backend, x, [layer], group_size)
    assert y.dtype == dtype
    assert_close(y, exact(x, [layer], group_size)[0])


@on_every_backend
@pytest.mark.parametrize(("group_size", "planes"), list(itertools.product((12, 32, 64, 128, -1), (1, 2, 3))))
def test_linear_takes_every_group_size_and_number_of_planes(
    backend: str, device: str, group_size: int, planes: int
) -> None:
    torch.manual_seed(planes)
    layer = random_weights(20, 150, group_size, planes=planes, mantissa=planes == 2, bias=True, device=device)
    x = torch.randn(17, 150, device=device)
    assert_close(linear(backend, x, [layer], group_size)[0], exact(x, [layer], group_size)[0])


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("exponent", "scale"), [(-126, 2.0**100), (127, 2.0**-110)])
def test_linear_holds_exponents_at_both_ends(
    backend: str, device: str, dtype: torch.dtype, exponent: int, scale: float
) -> None:
    torch.manual_seed(0)
    layer = random_weights(8, 100, 32, exponents=(exponent, exponent), device=device)
    x = (torch.randn(4, 100, device=device) * scale).to(dtype)
    assert_close(linear(backend, x, [layer], 32)[0], exact(x, [layer], 32)[0])


@on_every_backend
def test_linear_in_float16_does_not_clamp_exponents(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layer = random_weights(8, 64, 32, exponents=(25, 25), device=device)
    x = (torch.randn(4, 64, device=device) * 2.0**-20).half()
    assert_close(linear(backend, x, [layer], 32)[0], exact(x, [layer], 32)[0])


@on_every_backend
@pytest.mark.parametrize("shape", [(), (6, 1)], ids=["one", "a row each"])
def test_linear_broadcasts_a_mantissa(backend: str, device: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = random_weights(6, 70, 32, device=device)
    layer.E_mantissa = torch.full(shape, 200, dtype=torch.uint8, device=device)
    x = torch.randn(3, 70, device=device)
    assert_close(linear(backend, x, [layer], 32)[0], exact(x, [layer], 32)[0])


@on_every_backend
def test_linear_of_no_tokens_is_empty(backend: str, device: str) -> None:
    layer = random_weights(5, 130, 128, bias=True, device=device)
    (y,) = linear(backend, torch.zeros(2, 0, 130, device=device), [layer], 128)
    assert y.shape == (2, 0, 5)


@on_every_backend
def test_linear_reads_x_by_its_strides(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layer = random_weights(5, 66, 32, device=device)
    for x in (
        torch.randn(66, 7, device=device).t(),
        torch.randn(7, 132, device=device)[:, ::2],
        torch.randn(3, 66, 2, device=device).transpose(1, 2),
        torch.randn(1, 66, device=device).expand(4, 66),
    ):
        assert_close(linear(backend, x, [layer], 32)[0], exact(x, [layer], 32)[0])


@on_every_backend
def test_fused_layers_equal_single_ones(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layers = [random_weights(n, 70, 32, bias=n != 5, device=device) for n in (5, 1, 33)]
    x = torch.randn(6, 70, device=device)
    fused = linear(backend, x, layers, 32)
    for y, layer in zip(fused, layers, strict=True):
        assert torch.equal(y, linear(backend, x, [layer], 32)[0])


@on_every_backend
def test_a_bias_is_exact_at_both_ends_of_its_exponent(backend: str, device: str) -> None:
    layer = random_weights(3, 8, 32, bias=True, device=device)
    x = torch.zeros(2, 8, device=device)
    for exponent in (-128, 96):
        layer.bias = torch.tensor([-(2**31), 3, 2**30], dtype=torch.int32, device=device)
        layer.bias_exponent = torch.tensor([exponent], dtype=torch.int8, device=device)
        expected = torch.tensor([-(2.0**31), 3.0, 2.0**30], device=device, dtype=torch.float64) * 2.0**exponent
        assert torch.equal(linear(backend, x, [layer], 32)[0].double(), expected.expand(2, 3))


@on_every_backend
def test_linear_passes_opcheck(backend: str, device: str) -> None:
    layer = random_weights(5, 20, 8, bias=True, device=device)
    op = getattr(torch.ops.ternarize, f"linear_{backend}")
    args = ([layer.T_packed], [layer.E], [None], [layer.bias], [layer.bias_exponent], 8)
    torch.library.opcheck(op, (torch.randn(3, 20, device=device), *args))


def facts(device: str, capability: tuple[int, int], dtype: torch.dtype) -> Facts:
    return Facts(
        device=device,
        capability=capability,
        dtype=dtype,
        in_features=8,
        out_features=(8,),
        planes=(1,),
        group_size=4,
        mantissas=(None,),
    )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (facts("cuda", (7, 5), torch.float32), "compute capability 7.5 is below 8.0"),
        (facts("mps", (0, 0), torch.float32), "the tensors are on mps"),
        (facts("cuda", (9, 0), torch.float64), "float64 activations"),
    ],
)
def test_the_verifier_refuses_with_the_reason(given: Facts, reason: str) -> None:
    ok, got = verify("linear", given)
    assert not ok
    assert reason in got


def test_the_verifier_accepts_the_cpu_only_with_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = facts("cpu", (0, 0), torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert verify("linear", on_cpu)[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    ok, reason = verify("linear", on_cpu)
    assert not ok
    assert "TRITON_INTERPRET=1" in reason


def test_the_verifier_accepts_ampere_and_later() -> None:
    assert verify("linear", facts("cuda", (8, 0), torch.bfloat16))[0]
