"""The TileLang kernels of `linear_int8`: what is compiled, without a GPU, and what they compute, on a Hopper GPU."""

import contextlib
import dataclasses
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.activation import quantize_activation
from ternarize.backends import tilelang as backend
from ternarize.backends.select import Facts
from ternarize.packing import pack
from tests.backends.hopper_kit import assert_compiles, lower
from tests.backends.kit import assert_close, linear, linear_int8, random_weights

pytest.importorskip("tilelang", reason="TileLang is for Linux")


def _bytes(word: int) -> list[int]:
    """The four int8 of a register, lowest first."""
    return torch.tensor([word >> shift & 0xFF for shift in (0, 8, 16, 24)], dtype=torch.uint8).view(torch.int8).tolist()


def _byte_perm(low: int, high: int, selector: int) -> int:
    """CUDA's __byte_perm: byte i of the result is the byte of (low, high) that nibble i of the selector names."""
    both = high << 32 | low
    return sum((both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))


def _word(packed: Tensor, first: int) -> int:
    return int(sum(int(packed[first + i]) << 8 * i for i in range(4)))


@pytest.mark.parametrize("shift", range(7))
@pytest.mark.parametrize("g", [32, 64, 128, 256])
def test_packed_bytes_are_the_operand_that_the_wgmma_kernel_takes_them_for(g: int, shift: int) -> None:
    T = torch.randint(-1, 2, (1, g), dtype=torch.int8)
    packed = pack(T, g)[0]
    value = 64 >> shift
    values = value << 8 | (-value & 0xFF) << 24

    def permute(nibbles: int) -> tuple[int, int]:
        a, b = _byte_perm(values, 0, nibbles), _byte_perm(values, 0, nibbles >> 16)
        return _byte_perm(a, b, 0x6420), _byte_perm(a, b, 0x7531)

    for q in range(4):
        # Of each 16 columns, a thread has four from 4q.
        columns = (T[0].long() * value).view(g // 16, 4, 4)[:, q].tolist()
        if g == 32:
            word = _word(packed, q % 2 * 4) >> q // 2 * 2
            assert [_bytes(register) for register in permute(word & 0x33333333)] == columns
            continue
        words = g // 64
        for i in range(words):
            word = _word(packed, 16 * i + 4 * q)
            planes = [*permute(word & 0x33333333), *permute(word >> 2 & 0x33333333)]
            for plane, register in zip((0, 2, 1, 3), planes, strict=True):
                assert _bytes(register) == columns[plane * words + i]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"in_features": 2**17}, "in_features is 131072, int8 products need fewer than 131072"),
        ({"planes": (1, 2)}, "layers of one call have 1 and 2 trit planes"),
        ({"planes": (2,)}, "int8 activations need one trit plane"),
        ({"mantissas": (torch.int16,)}, "int8 activations need one trit plane, and scales that are powers of two"),
        (
            {"group_size": 512},
            "group_size is 512 at in_features 130944, int8 activations need one that divides it: 32, 64, 128, 256",
        ),
        ({"in_features": 192}, "group_size is 128 at in_features 192, int8 activations need one that divides it: "),
    ],
)
def test_verify_says_what_int8_activations_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    facts = Facts(
        device="cuda",
        capability=(9, 0),
        dtype=torch.bfloat16,
        in_features=2**17 - 128,
        out_features=(64,),
        planes=(1,),
        group_size=128,
        mantissas=(None,),
    )
    assert backend.verify("linear_int8", facts)[0]
    ok, got = backend.verify("linear_int8", dataclasses.replace(facts, **change))
    assert not ok
    assert got.startswith(reason)


# What is compiled.


@pytest.mark.parametrize(
    ("M", "N", "K", "g", "has_bias", "guarded"),
    [
        (64, 333, 1536, 64, True, True),
        (4096, 4096, 4096, 128, False, True),
        (64, 4096, 4096, 128, True, False),
        (17, 77, 192, 32, True, False),
        (300, 333, 192, 32, True, True),
    ],
)
def test_the_wgmma_kernel_multiplies_registers_and_compiles(
    tmp_path: Path, M: int, N: int, K: int, g: int, has_bias: bool, guarded: bool
) -> None:
    from ternarize.backends.tilelang.linear_int8_wgmma import choose_int8_wgmma_tile, int8_wgmma_program

    tile = choose_int8_wgmma_tile(M, N, K, g)
    layers = _layers(N, bias=has_bias)
    source = lower(int8_wgmma_program(layers, K, g, "bfloat16", guarded=guarded, tile=tile))
    assert "wgmma_rs<tl::DataType::kInt8, tl::DataType::kInt8, tl::DataType::kInt32" in source
    assert "tma_load(q_desc" in source
    call = source[source.rindex("ternarize::store_sums<") :].split(";")[0]
    pointers = ["accumulator", "exact", "state", "scale", *["bias_0", "bias_exponent_0"] * has_bias]
    pointers += [*["status_0"] * guarded, "y_0"]
    assert re.findall(r"&\((\w+)\[", call) == pointers
    assert_compiles(source, tmp_path)


# Which programs a call runs.


def _layers(*out_features: int, bias: bool = False) -> tuple[Any, ...]:
    from ternarize.backends.tilelang.layers import LayerShape

    return tuple(LayerShape(N=N, planes=1, mantissa=None, bias=bias) for N in out_features)


def _programs(M: int, *out_features: int, g: int = 128) -> Any:
    from ternarize.backends.tilelang.linear_int8 import programs_for

    return programs_for(M, _layers(*out_features), 4096, g, torch.float16, guarded=True, gpu=None)


@pytest.mark.parametrize("g", [64, 128, 256])
def test_a_few_tokens_are_one_launch_of_the_decode_kernel(g: int) -> None:
    from ternarize.backends.tilelang.linear_decode import DecodeTile

    (program,) = _programs(16, 4096, 1024, 1024, g=g)
    assert isinstance(program.tile, DecodeTile)
    assert (program.layers, program.activation) == (_layers(4096, 1024, 1024), "int8")
    assert (program.K, program.g, program.dtype, program.guarded) == (4096, g, "float16", True)


def test_more_tokens_and_groups_of_32_are_one_launch_of_wgmma_a_layer() -> None:
    from ternarize.backends.tilelang.linear_int8_wgmma import choose_int8_wgmma_tile

    for M, g in ((17, 128), (1, 32)):
        q, k, v = _programs(M, 4096, 1024, 1024, g=g)
        assert (q.layers, k.layers) == (_layers(4096), _layers(1024))
        assert (q.tile, k.tile) == tuple(choose_int8_wgmma_tile(M, N, 4096, g) for N in (4096, 1024))
        # Layers of one shape share a kernel.
        assert k == v


def test_a_call_launches_every_program_with_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from ternarize.backends.tilelang import build, host
    from ternarize.backends.tilelang.linear_int8 import linear_int8 as host_function

    torch.manual_seed(0)
    layers = [random_weights(N, 128, 64, bias=N == 32) for N in (48, 32)]
    q, scale = quantize_activation(torch.randn(2, 10, 128))
    status = [torch.zeros(2, dtype=torch.int32) for _ in layers]
    launched: list[int] = []

    def launch(*arguments: Tensor) -> None:
        i = len(launched)
        w = layers[i]
        given = (q.view(20, 128), scale.view(20), w.T_packed, w.E, w.bias, w.bias_exponent, status[i])
        expected = [tensor for tensor in given if tensor is not None]
        assert len(arguments) == len(expected) + 1
        assert all(torch.equal(got, needed) for got, needed in zip(arguments, expected, strict=False))
        y = arguments[-1]
        assert y.shape == (20, w.T_packed.shape[0])
        y.fill_(i)
        launched.append(i)

    def start(program: build.Program) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(launch)
        return future

    monkeypatch.setattr(build, "start", start)
    monkeypatch.setattr(host, "gpu_name", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    columns = [[getattr(w, name) for w in layers] for name in ("T_packed", "E", "E_mantissa", "bias", "bias_exponent")]
    T_packed, E, mantissa, bias, exponent = columns
    outputs = host_function(q, scale, T_packed, E, mantissa, bias, exponent, status, 64, torch.bfloat16)
    assert [(tuple(y.shape), y.dtype, float(y.mean())) for y in outputs] == [
        ((2, 10, 48), torch.bfloat16, 0.0),
        ((2, 10, 32), torch.bfloat16, 1.0),
    ]


# What is computed.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 16, 17, 64, 65, 257])
@pytest.mark.parametrize(("N", "K", "g"), [(333, 192, 32), (77, 576, 64), (1000, 1024, 128), (129, 512, 256)])
def test_linear_int8_equals_float64(dtype: torch.dtype, M: int, N: int, K: int, g: int) -> None:
    torch.manual_seed(0)
    layers = [random_weights(n, K, g, bias=n % 2 == 1, device="cuda") for n in (N, 64, 5)]
    q, scale = quantize_activation(torch.randn(2, M, K, device="cuda"))
    outputs = linear_int8("tilelang", q, scale, layers, g, dtype)
    for y, layer in zip(outputs, layers, strict=True):
        assert y.dtype == dtype
        assert_close(y, linear("torch", q.double() * scale.double(), [layer], g)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [3, 16, 40, 300])
@pytest.mark.parametrize("exponents", [(-126, -126), (127, 127), (-126, 127), (-20, 10)])
def test_linear_int8_is_exact_for_every_exponent(M: int, exponents: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = random_weights(140, 2048, 128, exponents=exponents, device="cuda")
    # The least scale, so that the largest weights give what bfloat16 holds, though their sums over q leave it.
    x = torch.randn(M, 2048, device="cuda") * (1e-6 if exponents[1] == 127 else 1.0)
    q, scale = quantize_activation(x)
    (y,) = linear_int8("tilelang", q, scale, [layer], 128, torch.bfloat16)
    assert_close(y, linear("torch", q.double() * scale.double(), [layer], 128)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("M", "K", "g"), [(2, 1152, 128), (16, 512, 64), (3, 192, 32), (40, 4096, 128), (300, 512, 256)]
)
def test_a_guarded_layer_reports_what_is_not_finite_and_its_neighbour_does_not(M: int, K: int, g: int) -> None:
    torch.manual_seed(0)
    layers = [random_weights(N, K, g, bias=True, device="cuda") for N in (64, 333, 7)]
    q, scale = quantize_activation(torch.randn(M, K, device="cuda"))
    names = ("T_packed", "E", "E_mantissa", "bias", "bias_exponent")
    columns = [[getattr(w, name) for w in layers] for name in names]
    status = [torch.zeros(2, dtype=torch.int32, device="cuda") for _ in layers]

    def run() -> list[list[int]]:
        torch.ops.ternarize.linear_int8_tilelang(q, scale, *columns, status, g, torch.float16)
        return [each.tolist() for each in status]

    assert run() == [[0, 0]] * 3
    # The last of its outputs leaves float16.
    layers[1].E[-1] = 20
    assert run() == [[0, 0], [1, 0], [0, 0]]
    scale[-1] = torch.nan
    assert run() == [[1, 0]] * 3
