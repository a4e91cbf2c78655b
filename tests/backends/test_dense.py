"""Products over strips of decoded weights: in float32 in the interpreter, in bfloat16 as the ops take them on a GPU."""

import pytest
import torch

from ternarize.backends.triton import dense
from ternarize.packing import WORKSPACE_BYTES, dequantize
from tests.backends.kit import Weights, assert_close, grad_input, linear, random_weights

#: Devices, with the dtype that takes this path there.
on_the_cpu_or_a_gpu = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param(
            "cpu",
            torch.float32,
            id="cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
        ),
        pytest.param("cuda", torch.bfloat16, id="cuda", marks=pytest.mark.gpu),
    ],
)


def bias_of(layer: Weights) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if layer.bias is None or layer.bias_exponent is None else (layer.bias, layer.bias_exponent)


@on_the_cpu_or_a_gpu
@pytest.mark.parametrize(
    ("K", "group_size"), [(256, 128), (384, 64), (256, 32), (320, -1), (448, 256), (130, 32), (7, 4), (201, -1), (1, 4)]
)
def test_a_strip_is_that_part_of_the_weight(device: str, dtype: torch.dtype, K: int, group_size: int) -> None:
    torch.manual_seed(K)
    layer = random_weights(37, K, group_size, exponents=(-126, 127), device=device)
    whole = dequantize(layer.T_packed, layer.E, None, K, group_size, dtype)
    scratch = torch.full((37 * K,), torch.nan, device=device, dtype=dtype)
    for n in (slice(0, 37), slice(3, 36)):
        for k in (slice(0, K), slice(0, min(K, 128)), slice(128 if K > 128 else 0, K)):
            W = dense.dequantise(layer.T_packed, layer.E, n, k, K, group_size, scratch)
            assert torch.equal(W, whole[n, k])


@on_the_cpu_or_a_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [130, 128])
def test_linear_in_strips_equals_float64(
    device: str, dtype: torch.dtype, bias: bool, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # Room for one strip of 128 columns: three strips, and with a bias several runs of tokens.
    monkeypatch.setattr(dense, "WORKSPACE_BYTES", 2**17)
    layer = random_weights(300, K, 32, bias=bias, device=device)
    x = torch.randn(K, 290, device=device).to(dtype).t()
    y = dense.linear(x, layer.T_packed, layer.E, bias_of(layer), 32)
    assert y.dtype == dtype
    assert_close(y, linear("torch", x.double(), [layer], 32)[0])


@on_the_cpu_or_a_gpu
@pytest.mark.parametrize("sizes", [(40,), (40, 3, 65)])
def test_grad_input_in_strips_equals_float64(
    device: str, dtype: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(dense, "WORKSPACE_BYTES", 2**16)
    layers = [random_weights(n, 520, 128, device=device) for n in sizes]
    grad_y = [torch.randn(290, 2 * n, device=device).to(dtype)[:, ::2] for n in sizes]
    grad_x = dense.grad_input(grad_y, [w.T_packed for w in layers], [w.E for w in layers], 520, 128)
    assert grad_x.dtype == dtype
    assert_close(grad_x, grad_input("torch", [g.double() for g in grad_y], layers, 520, 128))


def test_narrow_layers_take_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # The workspace has room for many more columns than there are: that must not leave the sums room for few tokens.
    calls = []
    monkeypatch.setattr(dense, "dequantise", lambda *_: torch.empty(0))
    monkeypatch.setattr(dense, "multiply", lambda *_, **__: calls.append(1))
    monkeypatch.setattr(dense, "multiprocessors", lambda _: 132)
    M, N, K = 32768, 768, 768
    grad_y = [torch.empty(M, N, dtype=torch.bfloat16)] * 3
    packed, E = torch.empty(N, K // 4, dtype=torch.uint8), torch.empty(N, K // 64, dtype=torch.int8)
    dense.grad_input(grad_y, [packed] * 3, [E] * 3, K, 64)
    # Of each layer three strips of 256 columns, and the tokens in two parts: float32 sums of all would be 34 MB.
    assert len(calls) == 3 * 3 * 2
    calls.clear()
    dense.linear(torch.empty(M, K, dtype=torch.bfloat16), packed, E, None, 64)
    assert len(calls) == 3


@on_the_cpu_or_a_gpu
@pytest.mark.parametrize(("exponent", "scale"), [(-126, 2.0**100), (127, 2.0**-110)])
def test_strips_hold_exponents_at_both_ends(device: str, dtype: torch.dtype, exponent: int, scale: float) -> None:
    torch.manual_seed(0)
    layer = random_weights(40, 64, 32, exponents=(exponent, exponent), device=device)
    x = (torch.randn(9, 64, device=device) * scale).to(dtype)
    assert_close(dense.linear(x, layer.T_packed, layer.E, None, 32), linear("torch", x.double(), [layer], 32)[0])
    grad_y = (torch.randn(9, 40, device=device) * scale).to(dtype)
    grad_x = dense.grad_input([grad_y], [layer.T_packed], [layer.E], 64, 32)
    assert_close(grad_x, grad_input("torch", [grad_y.double()], [layer], 64, 32))


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K", "group_size"), [(4096, 1024, 128), (1000, 2056, 64), (515, 4098, -1)])
def test_the_ops_multiply_many_tokens_in_strips(N: int, K: int, group_size: int) -> None:
    torch.manual_seed(0)
    layers = [random_weights(n, K, group_size, bias=n == N, device="cuda") for n in (N, 96)]
    x = torch.randn(2, 1000, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for y, layer in zip(linear("triton", x, layers, group_size), layers, strict=True):
        assert_close(y, linear("torch", x.detach().double(), [layer], group_size)[0])
    grad_y = [torch.randn(2, 1000, n, device="cuda", dtype=torch.bfloat16) for n in (N, 96)]
    exact = grad_input("torch", [g.double() for g in grad_y], layers, K, group_size)
    assert_close(grad_input("triton", grad_y, layers, K, group_size), exact)


@pytest.mark.gpu
def test_the_workspace_stays_within_its_bytes() -> None:
    layers = [random_weights(n, 8192, 128, bias=True, device="cuda") for n in (8192, 4096)]
    x = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
    grad_y = [torch.randn(4096, n, device="cuda", dtype=torch.bfloat16) for n in (8192, 4096)]

    def peak(call: object, result_bytes: int) -> int:
        assert callable(call)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before - result_bytes

    # Beside the scratch: the bias as float32.
    bound = WORKSPACE_BYTES + 2**20
    assert peak(lambda: linear("triton", x, layers[:1], 128), 4096 * 8192 * 2) <= bound
    assert peak(lambda: grad_input("triton", grad_y[:1], layers[:1], 8192, 128), 4096 * 8192 * 2) <= bound
    assert peak(lambda: grad_input("triton", grad_y, layers, 8192, 128), 4096 * 8192 * 2) <= bound


@pytest.mark.gpu
def test_a_cuda_graph_replays_them() -> None:
    torch.manual_seed(0)
    layer = random_weights(512, 256, 128, device="cuda")
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    grad_y = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    expected = linear("triton", x, [layer], 128)[0], grad_input("triton", [grad_y], [layer], 256, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = linear("triton", x, [layer], 128)[0], grad_input("triton", [grad_y], [layer], 256, 128)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_cublas_is_told_to_add_in_float32_and_the_setting_comes_back() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        for allowed in (True, False):
            matmul.allow_bf16_reduced_precision_reduction = allowed
            with dense.float32_sums():
                assert not matmul.allow_bf16_reduced_precision_reduction
            assert matmul.allow_bf16_reduced_precision_reduction is allowed
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_a_strip_is_at_most_half_of_a_layer() -> None:
    assert dense.strip_width(4096, 4096, 4096, 132) == 2048
    assert dense.strip_width(4096, 256, 4096, 132) == 128
    assert dense.strip_width(4096, 128, 4096, 132, unit=64) == 64
    # Not a multiple of the unit: half of it and a little more.
    assert dense.strip_width(4096, 1000, 4096, 132) == 512


def test_strips_fill_the_multiprocessors() -> None:
    # 3584 columns would be four strips of 3.4 waves; 14 waves are as few as all at once would take.
    assert dense.strip_width(4096, 14336, 4096, 132) == 4096
    assert dense.strip_width(4096, 14336, 3584, 132) == 3072
    assert dense.strip_width(8192, 4096, 1170 // 128 * 128, 132) == 1024
    assert dense.strip_width(300, 1000, 128, 132) == 128
