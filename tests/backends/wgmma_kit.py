"""What the tests of linear_wgmma.cuh share: cases, and how they run on the CPU and are compiled for a GPU."""

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.backends.hopper_kit import Case, Inputs, Operands, TensorMap, addresses, compile_emulation, emulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class WgmmaCase(Case):
    """A case; ``tile`` has what is not that of the smallest tile, and fewer stages than most calls have steps."""

    clusters: int = 1
    """In the emulation."""

    def wgmma_tile(self) -> Any:
        from ternarize.backends.tilelang.linear_wgmma import Tile

        return Tile(**{"BLOCK_M": 32, "ROW_TILES": 1, "WARPGROUPS": 2, "STAGES": 3, **self.tile})


def _call(case: WgmmaCase, index: int) -> str:
    """C++ of run_INDEX(maps of x and of T_packed and y of each layer, scale, M, the other pointers of each layer)."""
    from ternarize.backends.tilelang.linear_wgmma import wgmma_function

    tile = case.wgmma_tile()
    layers = []
    for i, layer in enumerate(case.layers):
        y_boxes = f"maps[{2 * i + 2}]" if layer.N % 8 == 0 else "0"
        pointers = ", ".join(f"p[{6 * i + j}]" for j in range(6))
        layers.append(f"ternarize::layer(maps[{2 * i + 1}], {y_boxes}, {layer.N}, {pointers})")
    function = wgmma_function(
        case.layers, case.K, case.g, case.dtype, guarded=True, tile=tile, activation=case.activation
    )
    shared_bytes = tile.shared_bytes(case.layers[0].planes, case.activation)
    sizes = (case.clusters, tile.CLUSTER, 128 * (tile.WARPGROUPS + 1), shared_bytes)
    return f"""
    extern "C" const char* run_{index}(const CUtensorMap* maps, void* scale, int M, void** p) {{
      return emulated::run({", ".join(map(str, sizes))}, [&](uint8_t* shared) {{
        {function}(maps[0], M, shared, scale, {", ".join(layers)});
      }});
    }}"""


@dataclasses.dataclass(frozen=True)
class Emulation:
    """Cases by name, compiled for the CPU."""

    cases: Mapping[str, WgmmaCase]
    library: ctypes.CDLL

    @classmethod
    def of(cls, cases: Mapping[str, WgmmaCase], folder: Path) -> "Emulation":
        from ternarize.backends.tilelang import linear_wgmma

        kernels = [Path(linear_wgmma.__file__).with_name(name) for name in linear_wgmma.PARTS]
        functions = [_call(case, index) for index, case in enumerate(cases.values())]
        return cls(cases, compile_emulation("emulated_wgmma.h", kernels, functions, folder))

    def run(self, name: str, inputs: Inputs, layers: Sequence[Operands]) -> None:
        """Write y and status of the layers, and fail with what the kernel did wrong, if anything."""
        case = self.cases[name]
        tile = case.wgmma_tile()
        rows = [
            torch.full((case.M + tile.BLOCK_M, layer.y.shape[1]), torch.nan, dtype=layer.y.dtype) for layer in layers
        ]
        for layer, memory in zip(layers, rows, strict=True):
            layer.y = memory[: case.M]
        maps = [TensorMap.of(inputs.x, tile.x_box(case.K, case.g, case.activation), written=True)]
        for layer, shape in zip(layers, case.layers, strict=True):
            maps += [TensorMap.of(layer.T_packed, tile.packed_box(shape.planes)), TensorMap.of(layer.y, tile.y_box())]
        pointers = [tensor for layer in layers for tensor in layer.tensors()[1:]]
        (scale,) = addresses([inputs.scale])
        emulate(
            self.library,
            f"run_{list(self.cases).index(name)}",
            [inputs.scale, *pointers],
            (TensorMap * len(maps))(*maps),
            ctypes.c_void_p(scale),
            case.M,
            addresses(pointers),
        )
        assert all(memory[case.M :].isnan().all() for memory in rows), "y is written past its last row"


def compile_cases(cases: Mapping[str, WgmmaCase]) -> dict[str, Any]:
    """All cases, compiled for the GPU."""
    import tilelang

    from ternarize.backends.tilelang.hopper import TARGET
    from ternarize.backends.tilelang.linear_wgmma import wgmma_program

    programs = [
        wgmma_program(
            case.layers,
            case.K,
            case.g,
            case.dtype,
            guarded=True,
            tile=case.wgmma_tile(),
            activation=case.activation,
        )
        for case in cases.values()
    ]
    return dict(zip(cases, tilelang.par_compile(programs, target=TARGET), strict=True))
