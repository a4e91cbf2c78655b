import itertools

import pytest
import torch
from torch import Tensor

from ternarize.activation import dequantize_activation, quantize_activation
from tests.backends.kit import BACKENDS, TOLERANCE, Weights, assert_close, linear, linear_int8, random_weights

on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def exact(q: Tensor, scale: Tensor, layer: Weights, group_size: int) -> Tensor:
    """In float64, by the reference of `linear`."""
    return linear("torch", q.double() * scale.double(), [layer], group_size)[0]


def check(backend: str, x: Tensor, layer: Weights, group_size: int) -> None:
    q, scale = quantize_activation(x)
    (y,) = linear_int8(backend, q, scale, [layer], group_size, x.dtype)
    assert y.dtype == x.dtype
    assert_close(y, exact(q, scale, layer, group_size))


# The quantiser.


def test_a_token_is_scaled_by_its_largest_magnitude() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [300.0, 0.0, -1.2]])
    q, scale = quantize_activation(x)
    assert q.tolist() == [[64, -127, 32], [127, 0, -1]]
    torch.testing.assert_close(scale, torch.tensor([[2.0], [300.0]]) / 127)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quantising_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 3, 96) * torch.logspace(-3, 30, 3)[:, None]).to(dtype)
    q, scale = quantize_activation(x.clamp(-6e4, 6e4))
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (5, 3, 1)
    assert ((q.double() * scale - x.clamp(-6e4, 6e4).double()).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_16_bits_a_quotient_is_rounded_exactly_away_from_zero_if_halfway(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 512).to(dtype)
    # 127 x / magnitude + 1/2, as integers.
    unit = 2**24
    magnitude = [int(value) for value in x.double().abs().amax(-1) * unit]
    rows = (x.double().abs() * unit).long().tolist()
    exact = [[(254 * v + m) // (2 * m) for v in row] for row, m in zip(rows, magnitude, strict=True)]
    halfway = sum((254 * v + m) % (2 * m) == 0 for row, m in zip(rows, magnitude, strict=True) for v in row)
    assert halfway > 3
    assert torch.equal(quantize_activation(x)[0], (torch.tensor(exact) * x.sign()).to(torch.int8))


def test_zeros_stay_zeros() -> None:
    q, scale = quantize_activation(torch.zeros(2, 8))
    assert not q.any()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_every_output_of_its_token(value: float) -> None:
    layer = random_weights(6, 40, 32)
    x = torch.ones(3, 40)
    x[1, 7] = value
    (y,) = linear_int8("torch", *quantize_activation(x), [layer], 32, x.dtype)
    assert torch.isfinite(y[[0, 2]]).all()
    assert not torch.isfinite(y[1]).any()


def test_dequantising_rounds_once() -> None:
    q, scale = quantize_activation(torch.randn(4, 33))
    exact = q.double() * scale.double()
    assert torch.equal(dequantize_activation(q, scale, torch.float64), exact)
    assert_close(dequantize_activation(q, scale, torch.bfloat16), exact)


# The op.


@on_every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 3), (5, 130), (192, 1), (33, 576)])
def test_linear_int8_equals_float64_at_odd_shapes(
    backend: str, device: str, dtype: torch.dtype, N: int, K: int
) -> None:
    torch.manual_seed(K + N)
    group_size = (32, 64, 128, -1)[(K + N) % 4]
    layer = random_weights(N, K, group_size, planes=1 + K % 3, bias=N % 2 == 1, device=device)
    check(backend, torch.randn(2, 3, K, device=device).to(dtype), layer, group_size)


@on_every_backend
@pytest.mark.parametrize(("group_size", "planes"), list(itertools.product((12, 64, -1), (1, 2, 3))))
def test_linear_int8_takes_every_group_size_and_number_of_planes(
    backend: str, device: str, group_size: int, planes: int
) -> None:
    torch.manual_seed(planes)
    layer = random_weights(20, 150, group_size, planes=planes, mantissa=planes == 2, bias=True, device=device)
    check(backend, torch.randn(17, 150, device=device), layer, group_size)


@on_every_backend
@pytest.mark.parametrize("exponents", [(-126, -126), (127, 127), (-126, 127), (-10, 2)])
def test_linear_int8_holds_exponents_at_both_ends(backend: str, device: str, exponents: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = random_weights(8, 160, 32, exponents=exponents, device=device)
    # The least scale, so that the largest weights give what float32 holds, though their sums over q leave it.
    x = torch.randn(4, 160, device=device) * (1e-6 if exponents[1] == 127 else 1.0)
    check(backend, x, layer, 32)


@on_every_backend
def test_linear_int8_of_no_tokens_is_empty(backend: str, device: str) -> None:
    layer = random_weights(5, 130, 128, bias=True, device=device)
    q, scale = quantize_activation(torch.zeros(2, 0, 130, device=device))
    assert linear_int8(backend, q, scale, [layer], 128, torch.float32)[0].shape == (2, 0, 5)


@on_every_backend
def test_linear_int8_reads_its_input_by_its_strides(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layer = random_weights(5, 66, 32, device=device)
    q, scale = quantize_activation(torch.randn(3, 2, 66, device=device))
    (y,) = linear_int8(backend, q.transpose(0, 1), scale.transpose(0, 1), [layer], 32, torch.float32)
    assert_close(y, exact(q, scale, layer, 32).transpose(0, 1))


@on_every_backend
def test_fused_layers_equal_single_ones(backend: str, device: str) -> None:
    torch.manual_seed(0)
    layers = [random_weights(n, 70, 32, bias=n != 5, device=device) for n in (5, 1, 33)]
    q, scale = quantize_activation(torch.randn(6, 70, device=device))
    fused = linear_int8(backend, q, scale, layers, 32, torch.float32)
    for y, layer in zip(fused, layers, strict=True):
        assert torch.equal(y, linear_int8(backend, q, scale, [layer], 32, torch.float32)[0])


@on_every_backend
def test_linear_int8_passes_opcheck(backend: str, device: str) -> None:
    layer = random_weights(5, 20, 8, bias=True, device=device)
    op = getattr(torch.ops.ternarize, f"linear_int8_{backend}")
    q, scale = quantize_activation(torch.randn(3, 20, device=device))
    args = ([layer.T_packed], [layer.E], [None], [layer.bias], [layer.bias_exponent], 8, torch.float32)
    torch.library.opcheck(op, (q, scale, *args))
