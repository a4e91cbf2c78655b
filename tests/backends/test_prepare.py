"""Kernels of a graph are begun when it is compiled, all at once, and called with all layers of a call."""

import contextlib
import dataclasses
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tilelang", reason="TileLang is for Linux")

from ternarize import TernaryOptimizer, explain, prewarm, ternarize
from ternarize.backends import compiler
from ternarize.backends.select import Choice
from ternarize.backends.tilelang import build, host, linear
from ternarize.backends.tilelang.build import Program, UpdateProgram
from ternarize.backends.tilelang.linear_decode import DecodeTile
from ternarize.bench.linear import Plan, begin_kernels
from ternarize.config import Activation, TernaryConfig
from tests.backends.kit import random_weights


class Attention(nn.Module):
    """Two layers that share x, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(128, 64), nn.Linear(128, 32, bias=False), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        q: Tensor = self.q(x)
        out: Tensor = self.o(q * self.k(x).mean())
        return out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that are begun, in a compiler that takes this machine for one with Hopper."""
    programs: list[Any] = []
    monkeypatch.setattr(compiler, "choose_node", lambda *_: Choice("tilelang", "said the test"))
    monkeypatch.setattr(host, "gpu_name", lambda _: None)
    monkeypatch.setattr(build, "start", programs.append)
    torch._dynamo.reset()
    return programs


def compiled(*, activation: Activation = "float", trainable: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    config = TernaryConfig(activation=activation)
    model = ternarize(Attention(), config, trainable=trainable).to(torch.bfloat16)
    return torch.compile(model, backend="ternary", **options)


def outputs(program: Program) -> list[int]:
    return [layer.N for layer in program.layers]


def test_all_kernels_of_a_graph_are_begun_when_it_is_compiled(started: list[Program]) -> None:
    with torch.no_grad():
        compiled()(torch.randn(3, 40, 128, dtype=torch.bfloat16))
    assert [outputs(program) for program in started] == [[64, 32], [128]]
    first, second = started
    assert [layer.bias for layer in first.layers] == [True, False]
    assert (first.K, first.g, first.dtype, first.guarded) == (128, 128, "bfloat16", True)
    assert (second.K, second.g) == (64, 64)
    assert first.tile == linear.choose_tile(120, first.layers, 128, 128, "bfloat16", None)


def test_kernels_for_int8_activations_are_begun_too(started: list[Program]) -> None:
    with torch.no_grad():
        compiled(activation="int8", dynamic=True)(torch.randn(40, 128, dtype=torch.bfloat16))
    # For many tokens, and for the one of decoding.
    assert [outputs(program) for program in started] == [[64, 32], [64, 32], [128], [128]]
    assert {(program.activation, program.dtype, program.guarded) for program in started} == {("int8", "bfloat16", True)}


def test_a_few_tokens_begin_kernels_that_round_them(started: list[Program]) -> None:
    with torch.no_grad():
        compiled(activation="int8", dynamic=False)(torch.randn(2, 128, dtype=torch.bfloat16))
    assert [outputs(program) for program in started] == [[64, 32], [128]]
    tiles = [program.tile for program in started if isinstance(program.tile, DecodeTile)]
    assert [(program.activation, program.guarded) for program in started] == [("float", True)] * 2
    assert [tile.DIGITS for tile in tiles] == [1, 1]


def test_a_dynamic_number_of_tokens_begins_decoding_of_one_too(started: list[Program]) -> None:
    with torch.no_grad():
        compiled(dynamic=True)(torch.randn(40, 128, dtype=torch.bfloat16))
    merged = [program for program in started if outputs(program) == [64, 32]]
    expected = [linear.choose_tile(M, merged[0].layers, 128, 128, "bfloat16", None) for M in (40, 1)]
    assert [program.tile for program in merged] == expected
    assert isinstance(merged[1].tile, DecodeTile)


def test_a_training_graph_begins_the_stage_of_its_updates_too(started: list[Program | UpdateProgram]) -> None:
    model = compiled(trainable=True)
    TernaryOptimizer(model)
    model(torch.randn(40, 128, dtype=torch.bfloat16))
    # One for each call, and the same one.
    updates = [program for program in started if isinstance(program, UpdateProgram)]
    assert updates == [UpdateProgram(dtype="bfloat16")] * 2
    assert "so does the stage of its update" in str(explain(model))


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What of Inductor's config is set for each graph, which is then not compiled."""
    given: list[dict[str, Any]] = []

    def compile_fx(graph: Any, _: Any, *, config_patches: dict[str, Any], **__: Any) -> Any:
        given.append(config_patches)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return given


def test_inference_with_tilelang_launches_inductors_kernels_programmatically(
    started: list[Program], patched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(40, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        compiled()(x)
        compiled(options={"triton.enable_pdl": False})(x)
    model = compiled(trainable=True)
    TernaryOptimizer(model)
    model(x)
    monkeypatch.setattr(compiler, "choose_node", lambda *_: Choice("triton", "said the test"))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled()(x)
    assert [patches.get("triton.enable_pdl") for patches in patched] == [True, False, None, None]


def test_independent_kernels_of_a_graph_that_decodes_are_launched_as_one(
    started: list[Program], patched: list[dict[str, Any]]
) -> None:
    with torch.no_grad():
        for M, settings in ((16, {}), (17, {}), (1, {"options": {"combo_kernels": False}}), (3, {"dynamic": True})):
            torch._dynamo.reset()
            compiled(**settings)(torch.randn(M, 128, dtype=torch.bfloat16))
    assert [patches.get("combo_kernels", False) for patches in patched] == [True, False, False, False]


def test_a_kernel_is_built_once_and_its_failure_raised_where_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Program] = []

    def compile_program(program: Program) -> None:
        built.append(program)
        raise RuntimeError("nvcc: no space left")

    monkeypatch.setattr(build, "compile_program", compile_program)
    monkeypatch.setattr(build, "_kernels", {})
    layers = host.layer_shapes([torch.empty(2, 48, 32, dtype=torch.uint8)], [None], [None])
    program = linear.program_for(1, layers, 128, -1, torch.float16, guarded=False, gpu=None)
    assert build.start(program) is build.start(program)
    with pytest.raises(RuntimeError, match="no space left"):
        build.start(program).result()
    assert built == [program]
    assert (program.g, program.layers[0].planes, program.layers[0].N) == (128, 2, 48)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_call_is_one_launch_of_all_its_layers(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 128)
    weights = [random_weights(N, 128, 64, mantissa=N == 48, bias=N == 32) for N in (48, 32)]
    status = [torch.zeros(2, dtype=torch.int32) for _ in weights] if guarded else []
    mantissa = [weights[0].E_mantissa, None]
    columns = [[getattr(w, name) for w in weights] for name in ("T_packed", "E", "bias", "bias_exponent")]
    launched: list[Program] = []

    def launch(*arguments: Tensor) -> None:
        given = list(arguments)
        expected = [x.view(6, 128), weights[0].T_packed, weights[0].E, mantissa[0], *status[:1]]
        expected += [weights[1].T_packed, weights[1].E, weights[1].bias, weights[1].bias_exponent, *status[1:]]
        for got, needed in zip(given, expected, strict=False):
            assert needed is not None
            assert torch.equal(got, needed)
        for y, N in zip(given[len(expected) :], (48, 32), strict=True):
            assert y.shape == (6, N)
            y.fill_(N)

    def start(program: Program) -> Future[Any]:
        launched.append(program)
        future: Future[Any] = Future()
        future.set_result(launch)
        return future

    monkeypatch.setattr(build, "start", start)
    monkeypatch.setattr(host, "gpu_name", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    T_packed, E, bias, bias_exponent = columns
    outputs = linear.linear(x, T_packed, E, mantissa, bias, bias_exponent, status, 64)
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 48), (2, 3, 32)]
    assert [float(y.mean()) for y in outputs] == [48.0, 32.0]
    (program,) = launched
    assert program.guarded == guarded
    assert [(layer.mantissa, layer.bias) for layer in program.layers] == [("int16", False), (None, True)]


def test_a_bench_begins_the_kernels_of_all_its_layers(started: list[Program], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(prewarm, "choose", lambda *_: Choice("tilelang", "said the test"))
    plan = Plan(
        tokens=(1, 40),
        config=TernaryConfig(),
        dtype=torch.bfloat16,
        kernels=("tilelang", "triton"),
        activations=("float", "int8"),
        device=torch.device("cuda"),
        seconds_per_cell=1.0,
    )
    begin_kernels([(512, 1024), (130, 96)], plan)
    begun = [(outputs(program), program.activation, type(program.tile) is DecodeTile) for program in started]
    assert ([512], "float", True) in begun
    assert ([512], "int8", False) in begun
    assert not any(program.guarded for program in started)
    started.clear()
    for other in ({"op": "update"}, {"kernels": ("triton",)}, {"device": torch.device("cpu")}):
        begin_kernels([(512, 1024)], dataclasses.replace(plan, **other))
    assert not started
