"""What tuning does with times and errors, with stand-ins for kernels: the kernels themselves run on a GPU."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

pytest.importorskip("tilelang", reason="TileLang is for Linux")

from ternarize.activation import dequantize_activation
from ternarize.backends.tilelang import tune
from ternarize.backends.tilelang.build import Program
from ternarize.backends.tilelang.layers import LayerShape
from ternarize.backends.tilelang.linear import heuristic_tile
from ternarize.backends.torch import linear as reference
from ternarize.checkpoint.format import PackedLayer
from ternarize.config import Activation, TernaryConfig

Kernel = Callable[..., None]

SHAPES = (
    LayerShape(N=48, planes=1, mantissa=None, bias=True),
    LayerShape(N=5, planes=1, mantissa=None, bias=False),
)

CALL = [PackedLayer(TernaryConfig(), in_features=256, out_features=shape.N, bias=shape.bias) for shape in SHAPES]

PROGRAM = Program(
    layers=SHAPES,
    K=256,
    g=128,
    dtype="bfloat16",
    guarded=True,
    tile=heuristic_tile(1, SHAPES, 256, 128, "bfloat16"),
)


def right(x: Tensor, *rest: Tensor) -> None:
    """The call of `CALL`, guarded, in the order of a kernel's arguments."""
    packed, E, bias, exponent, _, packed_2, E_2, _, y, y_2 = rest
    results = reference.linear(x, [packed, packed_2], [E, E_2], [None, None], [bias, None], [exponent, None], 128)
    for result, out in zip(results, (y, y_2), strict=True):
        out.copy_(result)


def slow(*arguments: Tensor) -> None:
    # Well above what the reference takes on a machine that is busy otherwise.
    time.sleep(0.1)
    right(*arguments)


def wrong(*arguments: Tensor) -> None:
    right(*arguments)
    arguments[-1].fill_(torch.nan)


def broken(*_: Tensor) -> None:
    raise RuntimeError("too much shared memory")


def tuned(kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch, activation: Activation = "float") -> list[tune.Tuned]:
    """Tune for 33 to 64 tokens, with a kernel for each candidate."""
    (programs,) = tune.tuning_programs(dataclasses.replace(PROGRAM, activation=activation), [40, 50]).values()
    stand_ins = dict(zip(programs, kernels, strict=False))

    def start(program: Program) -> Future[Kernel]:
        future: Future[Kernel] = Future()
        future.set_result(stand_ins[program])
        return future

    monkeypatch.setattr(tune, "start", start)
    monkeypatch.setattr(tune, "SECONDS", 0.01)
    return list(tune.tune_call(CALL, {64: programs[: len(kernels)]}, torch.device("cpu")))


def test_the_fastest_right_tile_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = tuned([slow, wrong, right], monkeypatch)
    assert result.key.tokens == 64
    assert result.key.layers == SHAPES
    assert result.tile == tune.candidates(64, SHAPES, 256, 128, "bfloat16")[2]
    assert result.gains
    assert result.heuristic_seconds is not None
    assert result.seconds < result.heuristic_seconds


def test_int8_activations_are_tuned_with_q_and_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(q: Tensor, scale: Tensor, *rest: Tensor) -> None:
        assert (q.dtype, scale.shape) == (torch.int8, (64,))
        right(dequantize_activation(q, scale[:, None], torch.float64), *rest)

    def unscaled(q: Tensor, scale: Tensor, *rest: Tensor) -> None:
        right(q.double(), *rest)

    (result,) = tuned([unscaled, rounded], monkeypatch, "int8")
    assert result.key.activation == "int8"
    assert result.tile == tune.candidates(64, SHAPES, 256, 128, "bfloat16", "int8")[1]
    assert result.heuristic_seconds is None


def test_the_heuristic_is_kept_unless_something_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = tuned([right, slow], monkeypatch)
    assert result.tile == heuristic_tile(64, SHAPES, 256, 128, "bfloat16")
    assert not result.gains


def test_where_the_heuristics_tile_fails_another_is_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = tuned([broken, slow], monkeypatch)
    assert result.heuristic_seconds is None
    assert result.gains


def test_nothing_comes_of_tiles_that_are_all_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned([wrong, broken], monkeypatch) == []


def test_each_power_of_two_is_timed_at_its_largest() -> None:
    programs = tune.tuning_programs(PROGRAM, [1, 2, 3, 40, 64, 65])
    assert list(programs) == [1, 2, 4, 64, 128]
    for M, of_tokens in programs.items():
        assert of_tokens[0].tile == heuristic_tile(M, SHAPES, 256, 128, "bfloat16")
        assert len(set(of_tokens)) == len(of_tokens)
