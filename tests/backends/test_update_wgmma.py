"""What update_wgmma.cuh stages: on the CPU, emulated. Activations and gradients are small integers: G is exact."""

import copy
import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.backends.torch import update as reference
from ternarize.layer import TernaryLinear
from tests.backends.hopper_kit import Dtype, TensorMap, addresses, compile_emulation, emulate
from tests.backends.test_update import integers, stage, staged
from tests.backends.test_update_tma import factored_layer

pytest.importorskip("tilelang", reason="TileLang is for Linux")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateCase:
    """A call, and how its work is shared out."""

    M: int
    N: int
    K: int
    dtype: Dtype = "bfloat16"
    clusters: int = 1
    STAGES: int = 2
    CLUSTER: int = 1
    PANEL: int = 2
    SKEW: int = 0
    DRAWN: int = 16

    def tile(self) -> Any:
        from ternarize.backends.tilelang.update_wgmma import UpdateTile

        return UpdateTile(STAGES=self.STAGES, CLUSTER=self.CLUSTER, PANEL=self.PANEL, SKEW=self.SKEW, DRAWN=self.DRAWN)


CASES = {
    "one token": UpdateCase(M=1, N=8, K=16),
    "one tile": UpdateCase(M=130, N=128, K=256, dtype="float16", STAGES=4),
    "several tiles": UpdateCase(M=70, N=200, K=528),
    "several tiles, skewed": UpdateCase(M=1100, N=200, K=528, STAGES=3, SKEW=2),
    "several tiles, two blocks": UpdateCase(
        M=70, N=264, K=272, dtype="float16", clusters=2, STAGES=3, PANEL=1, DRAWN=3
    ),
    "cluster of two": UpdateCase(M=150, N=328, K=304, CLUSTER=2, SKEW=2),
    "cluster of two, one row": UpdateCase(M=64, N=72, K=512, CLUSTER=2, dtype="float16"),
    "cluster of four": UpdateCase(M=65, N=456, K=80, CLUSTER=4),
}


def _call(case: UpdateCase, index: int) -> str:
    """C++ of run_INDEX(maps of grad_y and x, M, N, K, the other tensors)."""
    from ternarize.backends.tilelang.update_wgmma import update_function

    tile = case.tile()
    sizes = (case.clusters, case.CLUSTER, 384, tile.shared_bytes)
    pointers = ", ".join(f"p[{i}]" for i in range(7))
    return f"""
    extern "C" const char* run_{index}(const CUtensorMap* maps, int M, int N, int K, void** p) {{
      return emulated::run({", ".join(map(str, sizes))}, [&](uint8_t* shared) {{
        {update_function(case.dtype, tile)}(maps[0], maps[1], M, N, K, shared, {pointers});
      }});
    }}"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases, compiled for the CPU."""
    from ternarize.backends.tilelang import update_wgmma

    kernels = [Path(update_wgmma.__file__).with_name(name) for name in update_wgmma.PARTS]
    functions = [_call(case, index) for index, case in enumerate(CASES.values())]
    return compile_emulation("emulated_wgmma.h", kernels, functions, tmp_path_factory.mktemp("emulation"))


def _stage(library: ctypes.CDLL, name: str, layer: TernaryLinear, grad_y: Tensor, x: Tensor) -> None:
    """A micro-batch, as `ternarize.backends.tilelang.update` stages it; nothing else is written."""
    from ternarize.backends.tilelang.update_wgmma import BOX, parts_shapes

    assert layer.row_log2 is not None
    assert layer.col_log2 is not None
    assert layer.stage is not None
    assert layer.stage_row is not None
    assert layer.stage_col is not None
    (M, N), K = grad_y.shape, x.shape[1]
    factors = reference.normalisers(layer.row_log2, layer.col_log2)
    parts = [torch.full(shape, torch.nan) for shape in parts_shapes(N, K)]
    memory = torch.full((N + 8, K), 99, dtype=torch.int8)
    memory[:N] = layer.stage
    tensors = [*factors, layer.rng, memory, *parts, layer.status]
    maps = [TensorMap.of(tensor, BOX) for tensor in (grad_y, x)]
    function = f"run_{list(CASES).index(name)}"
    emulate(library, function, tensors, (TensorMap * 2)(*maps), M, N, K, addresses(tensors))
    assert (memory[N:] == 99).all(), "the stage is written past its last row"
    layer.stage.copy_(memory[:N])
    layer.stage_row += parts[0].sum(0)
    layer.stage_col += parts[1].sum(0)
    layer.status[1] += 1


def _operands(case: UpdateCase) -> tuple[Tensor, Tensor]:
    dtype = getattr(torch, case.dtype)
    return integers(case.M, case.N, device="cpu").to(dtype), integers(case.M, case.K, device="cpu").to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_it_stages_what_the_reference_stages(emulation: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    layer = factored_layer(case.N, case.K, "cpu")
    assert layer.stage is not None
    # After some micro-batches: some sums stop at the ends of int8.
    layer.stage.copy_(torch.randint(-127, 128, layer.stage.shape, dtype=torch.int8))
    layer.status[1] = 5
    layer.rng[0] = 2**32 - 5
    expected = copy.deepcopy(layer)
    for _ in range(2):
        grad_y, x = _operands(case)
        before = layer.stage.clone()
        _stage(emulation, name, layer, grad_y, x)
        stage("torch", [expected], [grad_y], x)
        for got, wanted in zip(staged(layer), staged(expected), strict=True):
            assert torch.equal(got, wanted)
        if case.N * case.K > 1000:
            moved = (layer.stage.int() - before.int()).unique().tolist()
            assert moved == list(range(-4, 5))
            assert layer.stage.min() == -127


@pytest.mark.parametrize("name", ["several tiles", "cluster of two"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_it_flags_what_is_not_finite(emulation: ctypes.CDLL, name: str, value: float) -> None:
    case = CASES[name]
    for n, k in ((3, None), (None, case.K - 1)):
        layer = factored_layer(case.N, case.K, "cpu")
        grad_y, x = _operands(case)
        if n is not None:
            grad_y[case.M - 1, n] = value
        if k is not None:
            x[0, k] = value
        _stage(emulation, name, layer, grad_y, x)
        assert layer.status.tolist() == [reference.NONFINITE_GRADIENT, 1]


def test_squares_beyond_float32_are_no_gradient_beyond_it(emulation: ctypes.CDLL) -> None:
    case = CASES["several tiles"]
    layer = factored_layer(case.N, case.K, "cpu")
    grad_y, x = (torch.zeros_like(operand) for operand in _operands(case))
    grad_y[0, 33], x[0, 520] = 2.0**60, 2.0**60
    _stage(emulation, "several tiles", layer, grad_y, x)
    assert layer.status.tolist() == [0, 1]
