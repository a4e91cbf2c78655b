"""What the host gives the decode kernel for what a call does besides."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tilelang", reason="TileLang is for Linux")

from ternarize.backends.tilelang import build, host, linear
from ternarize.backends.tilelang.build import Program
from ternarize.backends.tilelang.linear_decode import DecodeTile
from ternarize.backends.tilelang.linear_wgmma import Tile, wgmma_tiles
from ternarize.errors import ShapeError
from tests.backends.kit import Weights, random_weights

K = 512


@dataclasses.dataclass
class Called:
    program: Program
    arguments: tuple[Any, ...]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Called]]:
    """The calls of kernels, which compute nothing."""
    calls: list[Called] = []

    def start(program: Program) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(lambda *arguments: calls.append(Called(program, arguments)))
        return future

    monkeypatch.setattr(build, "start", start)
    monkeypatch.setattr(host, "gpu_name", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.inference_mode(False))
    host._kernel.cache_clear()
    yield calls
    host._kernel.cache_clear()


def run(x: Tensor, layers: list[Weights], **fused: Any) -> list[Tensor]:
    columns = zip(*((w.T_packed, w.E, w.E_mantissa, w.bias, w.bias_exponent) for w in layers), strict=True)
    outputs: list[Tensor] = torch.ops.ternarize.linear_tilelang(x, *map(list, columns), [], 128, **fused)
    return outputs


def layers_of(*sizes: int) -> list[Weights]:
    return [random_weights(N, K, 128) for N in sizes]


def random_x(M: int = 2) -> Tensor:
    return torch.randn(M, K).bfloat16()


def test_alone_a_call_says_that_nothing_is_done_besides(called: list[Called]) -> None:
    (y,) = run(random_x(), layers_of(64))
    (call,) = called
    weight, residual, eps, what = call.arguments[-4:]
    assert (weight.shape, residual.shape, eps, what) == ((K,), y.shape, 0.0, 0)


def test_a_residual_and_a_norm_are_passed_as_they_are(called: list[Called]) -> None:
    norm_weight, residual = torch.rand(K).bfloat16(), torch.randn(1, 2, 64).bfloat16()
    (y,) = run(
        random_x()[None],
        layers_of(64),
        norm_weight=norm_weight,
        norm_eps=1e-5,
        residual=residual.mT.contiguous().mT,
    )
    (call,) = called
    weight, added, eps, what = call.arguments[-4:]
    assert weight is norm_weight
    assert torch.equal(added, residual[0])
    assert added.is_contiguous()
    assert (eps, what) == (1e-5, 1 | 2)
    assert y.shape == (1, 2, 64)


def test_what_a_call_rounds_itself_is_passed_as_it_is_to_a_program_of_its_own(called: list[Called]) -> None:
    x, norm_weight = random_x(), torch.rand(K).bfloat16()
    run(x, layers_of(64), rounds=True, norm_weight=norm_weight)
    (call,) = called
    assert isinstance(call.program.tile, DecodeTile)
    assert (call.program.activation, call.program.tile.DIGITS) == ("float", 1)
    assert call.arguments[0] is x or torch.equal(call.arguments[0], x)
    assert call.arguments[-1] == 1


def test_two_planes_are_not_rounded_in_a_call(called: list[Called]) -> None:
    with pytest.raises(ShapeError, match="can do nothing besides"):
        run(random_x(), [random_weights(64, K, 128, planes=2)], rounds=True)
    assert called == []


def test_two_layers_that_are_gated_write_one_result(called: list[Called]) -> None:
    results = run(random_x(), layers_of(64, 64), gated=True)
    (call,) = called
    *_, first, second, _, eps, what = call.arguments
    assert [y.shape for y in results] == [(2, 64)]
    assert first.data_ptr() == second.data_ptr() == results[0].data_ptr()
    assert (eps, what) == (0.0, 4)


def test_what_is_done_besides_takes_the_decode_kernel_whatever_was_measured(
    called: list[Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    wgmma = next(iter(wgmma_tiles(host.layer_shapes([layers_of(64)[0].T_packed], [None], [None]), "bfloat16")))
    monkeypatch.setattr(linear, "choose_tile", lambda *_: wgmma)
    layers = layers_of(64)
    run(random_x(), layers)
    run(random_x(), layers, residual=torch.zeros(2, 64).bfloat16())
    assert [type(call.program.tile) for call in called] == [Tile, DecodeTile]
    # The wgmma kernel takes nothing of the kind.
    assert [len(call.arguments) for call in called] == [4, 8]


@pytest.mark.parametrize(
    ("M", "sizes", "besides", "refused"),
    [
        (2, (64, 64), {"residual": torch.zeros(2, 64).bfloat16()}, "asked for residual .* 2 tokens, 512 .* 64 and 64"),
        (2, (64, 48), {"gated": True}, "asked for gated"),
        (2, (64,), {"gated": True}, "asked for gated"),
        (17, (64,), {"residual": torch.zeros(17, 64).bfloat16()}, "a call of 17 tokens and 512 in_features"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    called: list[Called], M: int, sizes: tuple[int, ...], besides: dict[str, Any], refused: str
) -> None:
    with pytest.raises(ShapeError, match=refused):
        run(random_x(M), layers_of(*sizes), **besides)
    assert called == []


def test_a_row_that_no_block_can_normalise_is_refused(called: list[Called]) -> None:
    long_row = 2**14 + 512
    weight = torch.ones(long_row).bfloat16()
    with pytest.raises(ShapeError, match="asked for norm"):
        run(torch.randn(1, long_row).bfloat16(), [random_weights(64, long_row, 128)], norm_weight=weight)
    assert called == []
