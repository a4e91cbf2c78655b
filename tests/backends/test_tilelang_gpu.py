"""What the TileLang kernels compute, on a Hopper GPU."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.packing import ROW, dequantize, exp2_exact, groups_per_row, pack

pytest.importorskip("tilelang", reason="TileLang is for Linux")

pytestmark = pytest.mark.gpu

RELATIVE_ERROR = {torch.bfloat16: 2e-3, torch.float16: 5e-4}


@dataclasses.dataclass
class Layer:
    T_packed: Tensor
    E: Tensor
    bias: Tensor | None
    bias_exponent: Tensor | None
    K: int
    g: int

    @classmethod
    def random(cls, N: int, K: int, g: int, *, E: Tensor | None = None, bias_exponent: int | None = None) -> "Layer":
        """A layer on the GPU with E about -5, or as given: int [G] or [N, G]."""
        G = groups_per_row(K, g)
        T = torch.randint(-1, 2, (N, K), dtype=torch.int8)
        E = torch.randint(-8, -2, (N, G)) if E is None else E.expand(N, G)
        bias = None if bias_exponent is None else torch.randint(-(2**31), 2**31, (N,)).int().cuda()
        exponent = None if bias_exponent is None else torch.tensor([bias_exponent], dtype=torch.int8, device="cuda")
        return cls(pack(T, g).cuda(), E.to(torch.int8).contiguous().cuda(), bias, exponent, K, g)

    def expected(self, x: Tensor) -> Tensor:
        """float64 [..., N]."""
        y = x.double() @ dequantize(self.T_packed, self.E, None, self.K, self.g, torch.float64).mT
        if self.bias is None or self.bias_exponent is None:
            return y
        return y + torch.ldexp(self.bias.double(), self.bias_exponent)


def _run(x: Tensor, *layers: Layer, **besides: Any) -> list[Tensor]:
    outputs: list[Tensor] = torch.ops.ternarize.linear_tilelang(
        x,
        [layer.T_packed for layer in layers],
        [layer.E for layer in layers],
        [None for _ in layers],
        [layer.bias for layer in layers],
        [layer.bias_exponent for layer in layers],
        [],
        layers[0].g,
        **besides,
    )
    return outputs


def _assert_right(y: Tensor, x: Tensor, layer: Layer) -> None:
    expected = layer.expected(x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    error = (y.double() - expected).norm() / expected.norm()
    assert error < RELATIVE_ERROR[x.dtype], f"relative error {error:.1e}"


def _x(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@both_dtypes
@pytest.mark.parametrize("M", [1, 3, 16, 17, 64, 65, 257])
@pytest.mark.parametrize(
    ("N", "K", "g"),
    [(333, 192, 32), (77, 576, 64), (1000, 1024, 128), (129, 704, 256), (64, 128, ROW)],
)
def test_linear_equals_float64(dtype: torch.dtype, M: int, N: int, K: int, g: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(N, K, g, bias_exponent=-31 if N % 2 else None)
    x = _x(M, K, dtype=dtype)
    _assert_right(_run(x, layer)[0], x, layer)


@both_dtypes
@pytest.mark.parametrize("g", [32, 64, 128, 256])
def test_linear_equals_float64_in_the_widest_tile(dtype: torch.dtype, g: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(2047, 2048, g, bias_exponent=-30)
    x = _x(1100, 2048, dtype=dtype)
    _assert_right(_run(x, layer)[0], x, layer)


@both_dtypes
@pytest.mark.parametrize("M", [2, 40])
def test_linear_holds_over_the_whole_range_of_exponents(dtype: torch.dtype, M: int) -> None:
    torch.manual_seed(0)
    K, g, N = 2048, 64, 130
    # x is scaled the other way, so every group weighs the same in y; x of float16 is normal down to 2^-14. Up to 2^115:
    # the decode kernel sums twice a group of x before it scales the sum.
    ends = (-126, 127) if dtype == torch.bfloat16 else (-12, 12)
    E = torch.linspace(*ends, K // g).round().int()
    x = torch.randn(M, K, device="cuda") * exp2_exact(-E.clamp(-115, 124)).cuda().repeat_interleave(g)
    layer = Layer.random(N, K, g, E=(E + torch.randint(-1, 2, (N, K // g))).clamp(*ends))
    _assert_right(_run(x.to(dtype), layer)[0], x.to(dtype), layer)


def test_float16_neither_clamps_nor_overflows_exponents() -> None:
    torch.manual_seed(0)
    K, g = 512, 128
    # Clamped to what float16 holds, 2^-126 would be 2^-14 and its group, of large x, a tenth of y.
    layer = Layer.random(130, K, g, E=torch.tensor([-126, 0, 127, 20]))
    x = _x(5, K, dtype=torch.float16) * torch.tensor([2000.0, 1, 0, 2**-20], device="cuda").repeat_interleave(g).half()
    _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.parametrize(("E", "bias_exponent"), [(-126, -128), (90, 60), (-5, -40)])
def test_bias_takes_any_exponent(E: int, bias_exponent: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(200, 256, 128, E=torch.tensor([E]), bias_exponent=bias_exponent)
    # About as large as the bias, 2^30 · 2^bias_exponent.
    x = (_x(9, 256, dtype=torch.float32) * 2.0 ** (bias_exponent + 27 - E)).bfloat16()
    _assert_right(_run(x, layer)[0], x, layer)


@both_dtypes
def test_linear_takes_any_leading_dimensions_strides_and_alignment(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    K = 128
    layer = Layer.random(96, K, 64)
    for x in (
        _x(K, dtype=dtype),
        _x(2, 3, 5, K, dtype=dtype),
        _x(4, 7, 2 * K, dtype=dtype)[..., ::2],
        _x(K, 30, dtype=dtype).mT,
        # Contiguous, and 2 bytes off the 16 that TMA needs.
        _x(6 * K + 1, dtype=dtype)[1:].view(6, K),
    ):
        _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.parametrize("M", [1, 5, 8, 9, 16])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (64, 128), (333, 1152), (1000, 14336), (8192, 1536)])
def test_decoding_equals_float64_and_itself(M: int, N: int, K: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(N, K, 128, bias_exponent=-31 if N % 2 else None)
    x = _x(M, K, dtype=torch.bfloat16)
    y = _run(x, layer)[0]
    _assert_right(y, x, layer)
    # The parts of K are summed in one order, whichever warp is first.
    assert all(torch.equal(_run(x, layer)[0], y) for _ in range(3))


@pytest.mark.parametrize("M", [2, 40, 300])
def test_groups_of_128_hold_over_the_whole_range_of_exponents(M: int) -> None:
    torch.manual_seed(0)
    K, g, N = 4096, 128, 130
    E = torch.linspace(-126, 127, K // g).round().int()
    # Up to 2^115: the decode kernel sums twice a group of x before it scales the sum.
    x = torch.randn(M, K, device="cuda") * exp2_exact(-E.clamp(-115, 124)).cuda().repeat_interleave(g)
    layer = Layer.random(N, K, g, E=(E + torch.randint(-1, 2, (N, K // g))).clamp(-126, 127))
    _assert_right(_run(x.bfloat16(), layer)[0], x.bfloat16(), layer)


def test_no_tokens_give_an_empty_result() -> None:
    y = _run(torch.empty(2, 0, 128, device="cuda", dtype=torch.bfloat16), Layer.random(96, 128, 64))[0]
    assert y.shape == (2, 0, 96)


def test_layers_that_share_their_input_each_get_their_own_result() -> None:
    torch.manual_seed(0)
    layers = [Layer.random(N, 256, 128, bias_exponent=e) for N, e in ((256, None), (64, -31), (65, -31))]
    x = _x(33, 256, dtype=torch.bfloat16)
    for y, layer in zip(_run(x, *layers), layers, strict=True):
        _assert_right(y, x, layer)


def test_linear_runs_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    layer = Layer.random(256, 256, 128)
    x = _x(8, 256, dtype=torch.bfloat16)
    _run(x, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _run(x, layer)[0]
    x.copy_(_x(8, 256, dtype=torch.bfloat16))
    graph.replay()
    _assert_right(y, x, layer)


@both_dtypes
@pytest.mark.parametrize("M", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (4096, 14336), (333, 576)])
def test_a_residual_is_added_before_it_is_rounded(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x, residual = Layer.random(N, K, 64, bias_exponent=-30), _x(1, M, K, dtype=dtype), _x(1, M, N, dtype=dtype)
    (y,) = _run(x, layer, residual=residual)
    expected = layer.expected(x) + residual.double()
    assert (y.double() - expected).norm() / expected.norm() < RELATIVE_ERROR[dtype]
    # float32 sums another way now and then.
    assert (y == expected.to(dtype)).double().mean() > 0.95


@both_dtypes
@pytest.mark.parametrize("M", [1, 2, 3, 8, 16])
@pytest.mark.parametrize(("N", "K"), [(14336, 4096), (1536, 576), (5, 4096)])
def test_two_layers_are_gated_before_they_are_rounded(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up, x = Layer.random(N, K, 64), Layer.random(N, K, 64, bias_exponent=-30), _x(M, K, dtype=dtype)
    (y,) = _run(x, gate, up, gated=True)
    expected = torch.nn.functional.silu(gate.expected(x)) * up.expected(x)
    assert (y.double() - expected).norm() / expected.norm() < RELATIVE_ERROR[dtype]
    assert (y == expected.to(dtype)).double().mean() > 0.95


@both_dtypes
@pytest.mark.parametrize(("M", "K"), [(1, 4096), (2, 4096), (1, 16384), (2, 8192), (2, 576), (1, 64)])
def test_x_is_normalised_first(M: int, K: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [Layer.random(N, K, 64) for N in (4096, 1024, 333)]
    # Rows of different magnitude.
    x = (_x(M, K, dtype=torch.float32) * torch.logspace(-2, 2, M, device="cuda")[:, None]).to(dtype)
    weight = (1 + 0.1 * torch.randn(K, device="cuda")).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    normalised = exact.to(dtype)
    outputs = _run(x, *layers, norm_weight=weight, norm_eps=1e-5)
    for layer, y in zip(layers, outputs, strict=True):
        _assert_right(y, normalised, layer)


def test_a_norm_a_gate_and_a_guard_in_one_call() -> None:
    torch.manual_seed(0)
    gate, up, x = Layer.random(14336, 4096, 128), Layer.random(14336, 4096, 128), _x(2, 4096, dtype=torch.bfloat16)
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    (product,) = _run(x, gate, up, norm_weight=weight, norm_eps=1e-5, gated=True)
    normalised = torch.nn.functional.rms_norm(x, (4096,), weight, 1e-5)
    expected = torch.nn.functional.silu(gate.expected(normalised)) * up.expected(normalised)
    assert (product.double() - expected).norm() / expected.norm() < 1e-2
