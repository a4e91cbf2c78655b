import pytest
import torch

from tests.backends.kit import BACKENDS, TOLERANCE, assert_close, grad_input, random_weights

on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("K", [1, 3, 130, 576])
@pytest.mark.parametrize("N", [1, 5, 192])
def test_grad_input_equals_float64_at_odd_shapes(backend: str, device: str, dtype: torch.dtype, K: int, N: int) -> None:
    torch.manual_seed(K + N)
    group_size = (32, 64, 128, -1)[(K + N) % 4]
    layer = random_weights(N, K, group_size, planes=1 + K % 3, mantissa=N == 5, device=device)
    # Where T is 0 so is the gradient: no relative error is defined.
    grad_y = torch.randn(2, 3, N, device=device).to(dtype)
    grad_x = grad_input(backend, [grad_y], [layer], K, group_size)
    assert grad_x.dtype == dtype
    assert_close(grad_x, grad_input("torch", [grad_y.double()], [layer], K, group_size))


@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_grad_input_sums_fused_layers_and_rounds_once(backend: str, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [random_weights(n, 140, 64, device=device) for n in (3, 40, 65)]
    grad_y = [torch.randn(9, n, device=device).to(dtype) for n in (3, 40, 65)]
    exact = grad_input("torch", [g.double() for g in grad_y], layers, 140, 64)
    assert_close(grad_input(backend, grad_y, layers, 140, 64), exact)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("exponent", "scale"), [(-126, 2.0**100), (127, 2.0**-110)])
def test_grad_input_holds_exponents_at_both_ends(
    backend: str, device: str, dtype: torch.dtype, exponent: int, scale: float
) -> None:
    torch.manual_seed(0)
    layer = random_weights(40, 48, 32, exponents=(exponent, exponent), device=device)
    grad_y = (torch.randn(4, 40, device=device) * scale).to(dtype)
    assert_close(
        grad_input(backend, [grad_y], [layer], 48, 32), grad_input("torch", [grad_y.double()], [layer], 48, 32)
    )


@on_every_backend
def test_grad_input_in_float16_does_not_clamp_exponents(backend: str, device: str) -> None:
    torch.manual_seed(0)
    # Rows far beyond float16 on either side: a clamp to its exponents would be off by a power of two.
    layer = random_weights(40, 48, 32, exponents=(20, 24), device=device)
    layer.E[::2] = -60
    grad_y = (torch.randn(4, 40, device=device) * 2.0**-16).half()
    exact = grad_input("torch", [grad_y.double()], [layer], 48, 32)
    assert_close(grad_input(backend, [grad_y], [layer], 48, 32), exact)


@on_every_backend
def test_grad_input_of_no_tokens_is_empty(backend: str, device: str) -> None:
    layer = random_weights(5, 130, 128, device=device)
    assert grad_input(backend, [torch.zeros(2, 0, 5, device=device)], [layer], 130, 128).shape == (2, 0, 130)


@on_every_backend
def test_grad_input_reads_grad_y_by_its_strides(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layer = random_weights(10, 66, 32, device=device)
    for grad_y in (
        torch.randn(10, 7, device=device).t(),
        torch.randn(7, 20, device=device)[:, ::2],
        torch.randn(3, 1, 1, device=device).expand(3, 2, 10),
    ):
        exact = grad_input("torch", [grad_y.double()], [layer], 66, 32)
        assert_close(grad_input(backend, [grad_y], [layer], 66, 32), exact)


@on_every_backend
def test_grad_input_passes_opcheck(backend: str, device: str) -> None:
    layer = random_weights(5, 20, 8, device=device)
    op = getattr(torch.ops.ternarize, f"grad_input_{backend}")
    args = ([torch.randn(3, 5, device=device)], [layer.T_packed], [layer.E], [None], 20, 8)
    torch.library.opcheck(op, args)
