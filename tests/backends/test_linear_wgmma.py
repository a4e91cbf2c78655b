"""What linear_wgmma.cuh computes: on the CPU, emulated, and on a Hopper GPU."""

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.hopper_kit import (
    Case,
    Operands,
    TensorMap,
    addresses,
    compile_emulation,
    emulate,
    layer_shape,
    random_x,
    run_on_gpu,
)

pytest.importorskip("tilelang", reason="TileLang is for Linux")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WgmmaCase(Case):
    """A case; ``tile`` has what is not that of the smallest tile, and fewer stages than most calls have steps."""

    clusters: int = 1
    """In the emulation."""

    def wgmma_tile(self) -> Any:
        from ternarize.backends.tilelang.linear_wgmma import Tile

        return Tile(**{"BLOCK_M": 32, "ROW_TILES": 1, "WARPGROUPS": 2, "STAGES": 3, **self.tile})


CASES = {
    "one token": WgmmaCase(M=1, layers=(layer_shape(128),), K=512, g=128),
    "one step": WgmmaCase(M=17, layers=(layer_shape(40, bias=True),), K=64, g=64),
    "split over two": WgmmaCase(
        M=40, layers=(layer_shape(333, bias=True),), K=704, g=64, tile={"CLUSTER": 2, "ROW_TILES": 2, "STAGES": 4}
    ),
    "split over four, fewer steps than blocks": WgmmaCase(
        M=17,
        layers=(layer_shape(72),),
        K=192,
        g=64,
        dtype="float16",
        tile={"CLUSTER": 4, "WARPGROUPS": 3, "BLOCK_M": 16},
    ),
    "rounds, then a split": WgmmaCase(
        M=65,
        layers=(layer_shape(200, bias=True), layer_shape(9), layer_shape(136, bias=True)),
        K=640,
        g=128,
        clusters=2,
        tile={"CLUSTER": 2, "ROW_TILES": 2, "STAGES": 4},
    ),
    "float16, rounds": WgmmaCase(
        M=65, layers=(layer_shape(264, bias=True),), K=576, g=32, dtype="float16", tile={"WARPGROUPS": 4}
    ),
    "float16, two row tiles": WgmmaCase(
        M=40, layers=(layer_shape(256),), K=704, g=128, dtype="float16", tile={"BLOCK_M": 64, "ROW_TILES": 2}
    ),
    "groups of 32": WgmmaCase(M=40, layers=(layer_shape(104, bias=True),), K=576, g=32),
    "groups of 256, the last of 192": WgmmaCase(M=17, layers=(layer_shape(64),), K=960, g=256, tile={"CLUSTER": 4}),
    "groups of 128, the last of 64": WgmmaCase(M=17, layers=(layer_shape(59),), K=704, g=128, dtype="float16"),
    "a group that is larger than a row": WgmmaCase(M=2, layers=(layer_shape(64),), K=64, g=128),
    "a group a row": WgmmaCase(M=17, layers=(layer_shape(64, bias=True),), K=576, g=576),
    "two planes": WgmmaCase(
        M=17, layers=(layer_shape(101, planes=2), layer_shape(64, planes=2)), K=576, g=64, tile={"WARPGROUPS": 3}
    ),
    "three planes": WgmmaCase(
        M=17,
        layers=(layer_shape(136, planes=3),),
        K=1024,
        g=256,
        dtype="float16",
        tile={"ROW_TILES": 2, "CLUSTER": 2, "BLOCK_M": 16, "STAGES": 4},
    ),
    "mantissas of a byte": WgmmaCase(M=17, layers=(layer_shape(77, mantissa="uint8"),), K=640, g=128),
    "mantissas of two bytes": WgmmaCase(
        M=17, layers=(layer_shape(77, mantissa="int16", planes=2),), K=576, g=32, tile={"ROW_TILES": 2}
    ),
    "mantissas of four bytes": WgmmaCase(M=17, layers=(layer_shape(77, mantissa="int32"),), K=448, g=64),
}


def _call(case: WgmmaCase, index: int) -> str:
    """C++ of run_INDEX(maps of x and of T_packed and y of each layer, M, the other pointers of each layer)."""
    from ternarize.backends.tilelang.linear_wgmma import wgmma_function

    tile = case.wgmma_tile()
    layers = []
    for i, layer in enumerate(case.layers):
        y_boxes = f"maps[{2 * i + 2}]" if layer.N % 8 == 0 else "0"
        pointers = ", ".join(f"p[{6 * i + j}]" for j in range(6))
        layers.append(f"ternarize::layer(maps[{2 * i + 1}], {y_boxes}, {layer.N}, {pointers})")
    function = wgmma_function(case.layers, case.K, case.g, case.dtype, guarded=True, tile=tile)
    sizes = (case.clusters, tile.CLUSTER, 128 * (tile.WARPGROUPS + 1), tile.shared_bytes(case.layers[0].planes))
    return f"""
    extern "C" const char* run_{index}(const CUtensorMap* maps, int M, void** p) {{
      return emulated::run({", ".join(map(str, sizes))}, [&](uint8_t* shared) {{
        {function}(maps[0], M, shared, {", ".join(layers)});
      }});
    }}"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases, compiled for the CPU."""
    from ternarize.backends.tilelang import linear_wgmma

    kernels = [Path(linear_wgmma.__file__).with_name(name) for name in linear_wgmma.PARTS]
    functions = [_call(case, index) for index, case in enumerate(CASES.values())]
    return compile_emulation("emulated_wgmma.h", kernels, functions, tmp_path_factory.mktemp("emulation"))


def _emulate(library: ctypes.CDLL, name: str, x: Tensor, layers: Sequence[Operands]) -> None:
    case = CASES[name]
    tile = case.wgmma_tile()
    rows = [torch.full((case.M + tile.BLOCK_M, shape.N), torch.nan, dtype=x.dtype) for shape in case.layers]
    for layer, memory in zip(layers, rows, strict=True):
        layer.y = memory[: case.M]
    maps = [TensorMap.of(x, tile.x_box(case.K, case.g), written=True)]
    for layer, shape in zip(layers, case.layers, strict=True):
        maps += [TensorMap.of(layer.T_packed, tile.packed_box(shape.planes)), TensorMap.of(layer.y, tile.y_box())]
    pointers = [tensor for layer in layers for tensor in layer.tensors()[1:]]
    function = f"run_{list(CASES).index(name)}"
    emulate(library, function, pointers, (TensorMap * len(maps))(*maps), x.shape[0], addresses(pointers))
    assert all(memory[case.M :].isnan().all() for memory in rows), "y is written past its last row"


@pytest.mark.parametrize("name", CASES)
def test_wgmma_equals_float64(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, layers = random_x(case), [Operands.random(layer, case) for layer in case.layers]
    _emulate(emulation, name, x, layers)
    for layer in layers:
        layer.assert_right(x, case)
        assert layer.status.tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["split over two", "rounds, then a split", "float16, rounds", "mantissas of a byte"])
def test_wgmma_reports_a_result_that_is_not_finite(emulation: ctypes.CDLL, name: str, value: float) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, layers = random_x(case), [Operands.random(layer, case) for layer in case.layers]
    x[1, 300] = value
    _emulate(emulation, name, x, layers)
    for layer in layers:
        assert not layer.y[1].isfinite().any()
        assert layer.y[[0, *range(2, case.M)]].isfinite().all()
        assert layer.status.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["one token", "split over two", "float16, rounds"])
def test_wgmma_reports_a_result_that_its_dtype_does_not_hold(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, (layer,) = random_x(case), [Operands.random(layer, case) for layer in case.layers]
    x[-1] = 64
    # Of one output alone, the last, all weights are 1 and large.
    layer.T_packed[-1] = 0x55
    layer.E[-1] = 127 if case.dtype == "bfloat16" else 8
    x[:-1] *= 0.0
    _emulate(emulation, name, x, [layer])
    assert layer.y[-1, -1] == torch.inf
    assert layer.y[:-1].isfinite().all()
    assert layer.y[-1, :-1].isfinite().all()
    assert layer.status.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "ends", "most"),
    [
        ("groups of 32", (-126, 127), 124),
        ("split over two", (-126, 127), 124),
        ("a group a row", (-126, -126), 124),
        # The sum of a group of x is scaled after it is formed, and the scale has a mantissa of up to 99.
        ("mantissas of two bytes", (-126, 120), 112),
        ("float16, rounds", (-12, 12), 12),
    ],
)
def test_wgmma_holds_over_the_whole_range_of_exponents(
    emulation: ctypes.CDLL, name: str, ends: tuple[int, int], most: int
) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    exponents = torch.linspace(*ends, layer.E.shape[1]).round()
    layer.E[:] = exponents
    x = torch.randn(case.M, case.K) * torch.exp2(-exponents.clamp(-most, most)).repeat_interleave(case.g)[: case.K]
    x = x.to(getattr(torch, case.dtype))
    _emulate(emulation, name, x, [layer])
    layer.assert_right(x, case)
    assert layer.status.tolist() == [0, 0]


def test_float16_neither_clamps_nor_overflows_exponents(emulation: ctypes.CDLL) -> None:
    torch.manual_seed(0)
    name = "groups of 128, the last of 64"
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    # Clamped to what float16 holds, 2^-126 would be 2^-14 and its group, of large x, a tenth of y.
    layer.E[:] = torch.tensor([-126, 0, 127, 20, -1, -126])
    magnitude = torch.tensor([2000.0, 1, 0, 2**-20, 1, 2000]).repeat_interleave(case.g)[: case.K]
    x = (torch.randn(case.M, case.K) * magnitude).half()
    _emulate(emulation, name, x, [layer])
    layer.assert_right(x, case)


@pytest.mark.parametrize(("E", "bias_exponent"), [(-126, -128), (90, 60), (-5, -40)])
@pytest.mark.parametrize("name", ["one step", "split over two"])
def test_bias_takes_any_exponent(emulation: ctypes.CDLL, name: str, E: int, bias_exponent: int) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    layer.E[:] = E
    assert layer.bias_exponent is not None
    layer.bias_exponent[:] = bias_exponent
    # About as large as the bias, 2^30 · 2^bias_exponent.
    x = (torch.randn(case.M, case.K) * 2.0 ** (bias_exponent + 27 - E)).bfloat16()
    _emulate(emulation, name, x, [layer])
    layer.assert_right(x, case)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """All cases, compiled for the GPU."""
    import tilelang

    from ternarize.backends.tilelang.hopper import TARGET
    from ternarize.backends.tilelang.linear_wgmma import wgmma_program

    programs = [
        wgmma_program(case.layers, case.K, case.g, case.dtype, guarded=True, tile=case.wgmma_tile())
        for case in CASES.values()
    ]
    return dict(zip(CASES, tilelang.par_compile(programs, target=TARGET), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_wgmma_equals_float64_and_itself_on_the_gpu(kernels: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, layers = random_x(case), [Operands.random(layer, case) for layer in case.layers]
    run_on_gpu(kernels[name], [x], layers)
    first = [layer.y for layer in layers]
    for layer in layers:
        layer.assert_right(x, case)
        assert layer.status.tolist() == [0, 0]
    # The parts of K are summed in one order, whichever block is first.
    for _ in range(3):
        run_on_gpu(kernels[name], [x], layers)
        assert all(torch.equal(layer.y, y) for layer, y in zip(layers, first, strict=True))
    x[0, 5] = torch.nan
    run_on_gpu(kernels[name], [x], layers)
    for layer in layers:
        assert not layer.y[0].isfinite().any()
        assert layer.y[1:].isfinite().all()
        assert layer.status.tolist() == [1, 0]
