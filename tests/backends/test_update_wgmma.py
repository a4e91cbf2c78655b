"""What update_wgmma.cuh stages: on the CPU, emulated, and on a Hopper GPU.

Activations and gradients are small integers: G is exact, and results are equal.
"""

import copy
import ctypes
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryOptimizer, explain, ternarize
from ternarize.backends.torch import update as reference
from ternarize.layer import Apply, TernaryLinear
from tests.backends.hopper_kit import (
    Dtype,
    TensorMap,
    addresses,
    assert_compiles,
    compile_emulation,
    emulate,
    lower,
)
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
    blocks: int = 1
    STAGES: int = 2
    PANEL: int = 2
    SKEW: int = 0
    DRAWN: int = 5

    def tile(self) -> Any:
        from ternarize.backends.tilelang.update_wgmma import UpdateTile

        return UpdateTile(STAGES=self.STAGES, PANEL=self.PANEL, SKEW=self.SKEW, DRAWN=self.DRAWN)


CASES = {
    "one token": UpdateCase(M=1, N=8, K=8, DRAWN=0),
    "one tile": UpdateCase(M=130, N=128, K=256, dtype="float16", STAGES=4),
    "several tiles": UpdateCase(M=70, N=200, K=528),
    "several tiles, skewed": UpdateCase(M=300, N=200, K=528, STAGES=3, SKEW=2, DRAWN=16),
    "several tiles, two blocks": UpdateCase(M=70, N=264, K=264, dtype="float16", blocks=2, STAGES=3, PANEL=1, DRAWN=3),
    "two panels, skewed": UpdateCase(M=150, N=328, K=312, SKEW=2, DRAWN=1),
    "one row of tiles": UpdateCase(M=64, N=72, K=512, dtype="float16"),
    "one column of tiles": UpdateCase(M=65, N=456, K=80, PANEL=4),
}


def _call(case: UpdateCase, index: int) -> str:
    """C++ of run_INDEX(maps of grad_y and x, M, N, K, the other tensors)."""
    from ternarize.backends.tilelang.update_wgmma import update_function

    tile = case.tile()
    sizes = (case.blocks, 1, 384, tile.shared_bytes)
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


def _assert_equal(layer: TernaryLinear, expected: TernaryLinear) -> None:
    for got, wanted in zip(staged(layer), staged(expected), strict=True):
        # Sums of squares may be too large for float32 to be exact.
        torch.testing.assert_close(got, wanted, rtol=1e-6 if got.is_floating_point() else 0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_it_stages_what_the_reference_stages(emulation: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    layer = factored_layer(case.N, case.K, "cpu")
    assert layer.stage is not None
    expected = copy.deepcopy(layer)
    # What an earlier step left.
    layer.stage.fill_(99)
    for _ in range(2):
        grad_y, x = _operands(case)
        _stage(emulation, name, layer, grad_y, x)
        stage("torch", [expected], [grad_y], x)
        _assert_equal(layer, expected)
    if case.N * case.K > 1000:
        assert layer.stage.unique().tolist() == list(range(-8, 9))


@pytest.mark.parametrize("name", ["several tiles", "one column of tiles"])
def test_staged_integers_saturate(emulation: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    layer = factored_layer(case.N, case.K, "cpu")
    assert layer.stage is not None
    layer.stage.copy_(torch.randint(-127, 128, layer.stage.shape, dtype=torch.int8))
    layer.status[1] = 5
    expected = copy.deepcopy(layer)
    grad_y, x = _operands(case)
    _stage(emulation, name, layer, grad_y, x)
    stage("torch", [expected], [grad_y], x)
    _assert_equal(layer, expected)
    assert layer.stage.min() == -127
    assert layer.stage.max() == 127


@pytest.mark.parametrize("name", ["several tiles", "two panels, skewed"])
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


def test_no_tokens_stage_nothing() -> None:
    layer = factored_layer(8, 16, "cpu")
    stage("tilelang", [layer], [torch.zeros(0, 8, dtype=torch.bfloat16)], torch.zeros(0, 16, dtype=torch.bfloat16))
    *sums, status = staged(layer)
    assert not any(tensor.any() for tensor in sums)
    assert status.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_program_passes_its_arguments_in_order_and_compiles(tmp_path: Path, dtype: Dtype) -> None:
    from ternarize.backends.tilelang.update_wgmma import TILE, update_program

    source = lower(update_program(dtype, TILE))
    call = source[source.rindex("ternarize::update_wgmma<") :].split(";")[0]
    given = re.sub(r"\(&\((\w+)\[0\]\)\)", r"\1", call[call.index(">(") + 2 :])
    assert re.findall(r"\w+", given) == [
        *("grad_y_desc", "x_desc", "M", "N", "K", "shared", "row_factor", "col_factor"),
        *("rng", "stage", "row_parts", "col_parts", "status"),
    ]
    # Swizzled boxes start where the pattern does.
    assert "extern __shared__ __align__(1024)" in source
    assert_compiles(source, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 8, 16), (19, 16, 72), (300, 200, 528), (777, 2056, 1040), (64, 4096, 4096), (4100, 520, 272)]
)
def test_the_op_stages_what_the_reference_stages(dtype: torch.dtype, M: int, N: int, K: int) -> None:
    layers = [factored_layer(N, K, "cuda"), factored_layer(8, K, "cuda")]
    expected = copy.deepcopy(layers)
    for _ in range(3):
        # A row of a larger matrix is no multiple of 16 bytes.
        x = integers(M, K + 1, device="cuda").to(dtype)[:, :K]
        grad_y = [integers(M, n, device="cuda").to(dtype) for n in (N, 8)]
        stage("tilelang", layers, grad_y, x)
        stage("torch", expected, grad_y, x)
        for layer, other in zip(layers, expected, strict=True):
            _assert_equal(layer, other)


@pytest.mark.gpu
def test_the_op_gives_the_same_sums_every_time() -> None:
    torch.manual_seed(0)
    layer = factored_layer(1000, 816, "cuda")
    grad_y = torch.randn(777, 1000, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(777, 816, device="cuda", dtype=torch.bfloat16)
    others = [copy.deepcopy(layer) for _ in range(3)]
    stage("tilelang", [layer], [grad_y], x)
    for other in others:
        stage("tilelang", [other], [grad_y], x)
        _assert_equal(layer, other)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_op_flags_what_is_not_finite(value: float) -> None:
    layer = factored_layer(328, 304, "cuda")
    grad_y, x = integers(150, 328, device="cuda").bfloat16(), integers(150, 304, device="cuda").bfloat16()
    grad_y[149, 327] = value
    stage("tilelang", [layer], [grad_y], x)
    assert layer.status.tolist() == [reference.NONFINITE_GRADIENT, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("apply", ["step", "backward"])
def test_a_compiled_step_behind_the_gate_is_that_of_triton(monkeypatch: pytest.MonkeyPatch, apply: Apply) -> None:
    monkeypatch.setenv("TERNARIZE_TILELANG_TRAINING", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256)).to("cuda", torch.bfloat16)
    ours = ternarize(model)
    theirs = copy.deepcopy(ours)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    for each, kernels in ((ours, "tilelang"), (theirs, "triton")):
        optimizer = TernaryOptimizer(each, apply=apply)
        compiled: Any = torch.compile(each, backend="ternary", options={"kernels": kernels})
        for _ in range(2):
            compiled(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert explain(ours).kernels("training") == {"tilelang": 2}
    # Sums in another order: a few integers round to the next.
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        if name.endswith("log2"):
            assert (parameter.int() - other.int()).abs().max() <= 4, name
        else:
            assert torch.ne(parameter, other).float().mean() < 0.05, name
