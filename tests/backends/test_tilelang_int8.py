"""The TileLang kernels of `linear_int8`: which a call runs, and what they compute, on a Hopper GPU."""

import contextlib
import dataclasses
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.activation import quantize_activation
from ternarize.backends import tilelang as backend
from ternarize.backends.select import Facts
from tests.backends.kit import assert_close, linear, linear_int8, random_weights

pytest.importorskip("tilelang", reason="TileLang is for Linux")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"in_features": 2**17}, "in_features is 131072, int8 products need fewer than 131072"),
        ({"planes": (1, 2)}, "layers of one call have 1 and 2 trit planes"),
        ({"planes": (2,)}, "int8 activations need one trit plane"),
        ({"mantissas": (torch.int16,)}, "int8 activations need one trit plane, and scales that are powers of two"),
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
    for accepted in (facts, dataclasses.replace(facts, group_size=512), dataclasses.replace(facts, in_features=192)):
        assert backend.verify("linear_int8", accepted)[0]
    ok, got = backend.verify("linear_int8", dataclasses.replace(facts, **change))
    assert not ok
    assert got.startswith(reason)


# Which programs a call runs.


def _layers(*out_features: int, bias: bool = False) -> tuple[Any, ...]:
    from ternarize.backends.tilelang.layers import LayerShape

    return tuple(LayerShape(N=N, planes=1, mantissa=None, bias=bias) for N in out_features)


def _program(M: int, *out_features: int, g: int = 128) -> Any:
    from ternarize.backends.tilelang.linear_int8 import program_for

    return program_for(M, _layers(*out_features), 4096, g, torch.float16, guarded=True, gpu=None)


@pytest.mark.parametrize(("M", "g", "decodes"), [(16, 64, True), (16, 256, True), (17, 128, False), (1, 32, False)])
def test_all_layers_of_a_call_are_one_launch(M: int, g: int, decodes: bool) -> None:
    from ternarize.backends.tilelang.linear_decode import DecodeTile
    from ternarize.backends.tilelang.linear_wgmma import wgmma_tiles

    program = _program(M, 4096, 1024, 1024, g=g)
    assert isinstance(program.tile, DecodeTile) == decodes
    assert decodes or program.tile in wgmma_tiles(program.layers, "float16", "int8")
    assert (program.layers, program.activation) == (_layers(4096, 1024, 1024), "int8")
    assert (program.K, program.g, program.dtype, program.guarded) == (4096, g, "float16", True)


def test_a_call_launches_its_program_with_q_its_scale_and_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from ternarize.backends.tilelang import build, host
    from ternarize.backends.tilelang.linear_int8 import linear_int8 as host_function

    torch.manual_seed(0)
    layers = [random_weights(N, 128, 64, bias=N == 32) for N in (48, 32)]
    q, scale = quantize_activation(torch.randn(2, 10, 128))
    status = [torch.zeros(2, dtype=torch.int32) for _ in layers]
    given = [q.view(20, 128), scale.view(20)]
    for w, of_layer in zip(layers, status, strict=True):
        given += [tensor for tensor in (w.T_packed, w.E, w.bias, w.bias_exponent, of_layer) if tensor is not None]

    def launch(*arguments: Tensor) -> None:
        assert len(arguments) == len(given) + 2
        assert all(torch.equal(got, needed) for got, needed in zip(arguments, given, strict=False))
        for i, y in enumerate(arguments[-2:]):
            assert y.shape == (20, layers[i].T_packed.shape[0])
            y.fill_(i)

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
@pytest.mark.parametrize(
    ("N", "K", "g"),
    [
        (333, 192, 32),
        (77, 576, 64),
        (1000, 1024, 128),
        (129, 512, 256),
        (136, 704, 128),
        (72, 1536, -1),
        (40, 960, 512),
    ],
)
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
