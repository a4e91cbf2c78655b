"""What linear_wgmma.cuh computes: on the CPU, emulated, and on a Hopper GPU."""

from typing import Any

import pytest
import torch

from tests.backends.hopper_kit import ROUNDING_ERROR, Inputs, Operands, layer_shape, run_on_gpu
from tests.backends.wgmma_kit import Emulation, WgmmaCase, compile_cases

pytest.importorskip("tilelang", reason="TileLang is for Linux")


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
    "80 tokens, split over four, of which two store": WgmmaCase(
        M=80, layers=(layer_shape(200, bias=True),), K=704, g=64, tile={"CLUSTER": 4, "BLOCK_M": 80, "STAGES": 4}
    ),
    "176 tokens, split over two": WgmmaCase(
        M=177, layers=(layer_shape(72),), K=576, g=32, dtype="float16", tile={"CLUSTER": 2, "BLOCK_M": 176}
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
    "int8, one step": WgmmaCase(M=17, layers=(layer_shape(40, bias=True),), K=128, g=128, activation="int8"),
    "int8, split over two": WgmmaCase(
        M=40,
        layers=(layer_shape(333, bias=True),),
        K=1408,
        g=128,
        activation="int8",
        tile={"CLUSTER": 2, "ROW_TILES": 2, "STAGES": 4},
    ),
    "int8, split over four, fewer steps than blocks": WgmmaCase(
        M=17, layers=(layer_shape(72),), K=192, g=64, activation="int8", tile={"CLUSTER": 4, "BLOCK_M": 16}
    ),
    "int8, 48 tokens, split over eight, of which six store": WgmmaCase(
        M=49,
        layers=(layer_shape(333, bias=True),),
        K=1408,
        g=128,
        activation="int8",
        tile={"CLUSTER": 8, "ROW_TILES": 2, "BLOCK_M": 48, "STAGES": 5},
    ),
    "int8, rounds, then a split": WgmmaCase(
        M=65,
        layers=(layer_shape(200, bias=True), layer_shape(9), layer_shape(136, bias=True)),
        K=640,
        g=64,
        dtype="float16",
        activation="int8",
        clusters=2,
        tile={"CLUSTER": 2, "STAGES": 4, "WARPGROUPS": 3},
    ),
    "int8, groups of 32": WgmmaCase(M=40, layers=(layer_shape(104, bias=True),), K=576, g=32, activation="int8"),
    "int8, groups of 32, two row tiles": WgmmaCase(
        M=17, layers=(layer_shape(264),), K=1024, g=32, activation="int8", tile={"ROW_TILES": 2, "BLOCK_M": 16}
    ),
    "int8, groups of 64, two row tiles": WgmmaCase(
        M=17, layers=(layer_shape(264),), K=960, g=64, activation="int8", tile={"ROW_TILES": 2, "BLOCK_M": 16}
    ),
    "int8, groups of 256, the last of 192": WgmmaCase(
        M=17, layers=(layer_shape(64),), K=960, g=256, activation="int8", tile={"CLUSTER": 4}
    ),
    "int8, the last group of 64": WgmmaCase(M=17, layers=(layer_shape(59),), K=704, g=128, activation="int8"),
    "int8, a group a row": WgmmaCase(M=17, layers=(layer_shape(64, bias=True),), K=576, g=576, activation="int8"),
}

INT8_CASES = [name for name, case in CASES.items() if case.activation == "int8"]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """All cases, compiled for the CPU."""
    return Emulation.of(CASES, tmp_path_factory.mktemp("emulation"))


@pytest.mark.parametrize("name", CASES)
def test_wgmma_equals_float64(emulation: Emulation, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    emulation.run(name, inputs, layers)
    for layer in layers:
        layer.assert_right(inputs.value(), case)
        assert layer.status.tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    "name",
    [
        "split over two",
        "rounds, then a split",
        "float16, rounds",
        "mantissas of a byte",
        "int8, split over two",
        "int8, rounds, then a split",
    ],
)
def test_wgmma_reports_a_result_that_is_not_finite(emulation: Emulation, name: str, value: float) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    if inputs.scale is None:
        inputs.x[1, 300] = value
    else:
        inputs.scale[1] = value
    emulation.run(name, inputs, layers)
    for layer in layers:
        assert not layer.y[1].isfinite().any()
        assert layer.y[[0, *range(2, case.M)]].isfinite().all()
        assert layer.status.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["one token", "split over two", "float16, rounds"])
def test_wgmma_reports_a_result_that_its_dtype_does_not_hold(emulation: Emulation, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, (layer,) = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    inputs.x[-1] = 64
    # Of one output alone, the last, all weights are 1 and large.
    layer.T_packed[-1] = 0x55
    layer.E[-1] = 127 if case.dtype == "bfloat16" else 8
    inputs.x[:-1] = 0
    emulation.run(name, inputs, [layer])
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
    emulation: Emulation, name: str, ends: tuple[int, int], most: int
) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    exponents = torch.linspace(*ends, layer.E.shape[1]).round()
    layer.E[:] = exponents
    x = torch.randn(case.M, case.K) * torch.exp2(-exponents.clamp(-most, most)).repeat_interleave(case.g)[: case.K]
    inputs = Inputs(x=x.to(getattr(torch, case.dtype)))
    emulation.run(name, inputs, [layer])
    layer.assert_right(inputs.value(), case)
    assert layer.status.tolist() == [0, 0]


def test_float16_neither_clamps_nor_overflows_exponents(emulation: Emulation) -> None:
    torch.manual_seed(0)
    name = "groups of 128, the last of 64"
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    # Clamped to what float16 holds, 2^-126 would be 2^-14 and its group, of large x, a tenth of y.
    layer.E[:] = torch.tensor([-126, 0, 127, 20, -1, -126])
    magnitude = torch.tensor([2000.0, 1, 0, 2**-20, 1, 2000]).repeat_interleave(case.g)[: case.K]
    inputs = Inputs(x=(torch.randn(case.M, case.K) * magnitude).half())
    emulation.run(name, inputs, [layer])
    layer.assert_right(inputs.value(), case)


@pytest.mark.parametrize(("E", "bias_exponent"), [(-126, -128), (90, 60), (-5, -40)])
@pytest.mark.parametrize("name", ["one step", "split over two"])
def test_bias_takes_any_exponent(emulation: Emulation, name: str, E: int, bias_exponent: int) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    layer.E[:] = E
    assert layer.bias_exponent is not None
    layer.bias_exponent[:] = bias_exponent
    # About as large as the bias, 2^30 · 2^bias_exponent.
    inputs = Inputs(x=(torch.randn(case.M, case.K) * 2.0 ** (bias_exponent + 27 - E)).bfloat16())
    emulation.run(name, inputs, [layer])
    layer.assert_right(inputs.value(), case)


@pytest.mark.parametrize("name", INT8_CASES)
def test_int8_sums_are_exact(emulation: Emulation, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    # Sums of less than 24 bits, and scales that are powers of two: all that is rounded is the result.
    assert inputs.scale is not None
    inputs.scale = torch.exp2(inputs.scale.log2().round())
    for layer in layers:
        layer.bias = None
        # As far apart as an operand of 8 bits holds.
        layer.E[:] = torch.randint(-9, -2, layer.E.shape)
    emulation.run(name, inputs, layers)
    for layer in layers:
        assert torch.equal(layer.y, layer.expected(inputs.value(), case).to(layer.y.dtype))


@pytest.mark.parametrize("ends", [(-126, 127), (-126, -126), (127, 127), (-20, 10)])
@pytest.mark.parametrize("name", [name for name in INT8_CASES if CASES[name].dtype == "bfloat16"])
def test_int8_takes_every_exponent(emulation: Emulation, name: str, ends: tuple[int, int]) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    # The quantiser's least where results would not be finite otherwise; sums over q are not.
    inputs.scale = torch.full((case.M,), 1e-5 / 127 if ends[1] == 127 else 1.0)
    for layer in layers:
        layer.bias = None
        # Of some rows alone: those that share a warpgroup with them must not suffer.
        layer.E[::7] = torch.randint(ends[0], ends[1] + 1, layer.E[::7].shape, dtype=torch.int8)
    emulation.run(name, inputs, layers)
    for layer in layers:
        expected = layer.expected(inputs.value(), case)
        # The least of float32 and bfloat16 is 2^-149 and 2^-133.
        rows = expected.abs().amax(0, keepdim=True).clamp_min(2.0**-110)
        torch.testing.assert_close(layer.y.double() / rows, expected / rows, rtol=ROUNDING_ERROR[case.dtype], atol=1e-5)
        assert layer.status.tolist() == [0, 0]


@pytest.mark.parametrize(
    "name", ["int8, groups of 32, two row tiles", "int8, groups of 64, two row tiles", "int8, the last group of 64"]
)
def test_what_int8_sums_before_a_base_moves_is_kept_exactly(emulation: Emulation, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, (layer,) = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    inputs.scale = torch.ones(case.M)
    # The third group takes back what the first has given, and leaves of the sum what float32 would have lost.
    G, g = layer.E.shape[1], case.g
    first, third = slice(0, g), slice(2 * g, 3 * g)
    inputs.x[:, third] = inputs.x[:, first]
    packed = layer.T_packed.view(len(layer.E), -1)
    packed[:, : g // 4], packed[:, g // 2 : 3 * g // 4] = 0x55, 0xFF
    layer.E[:] = torch.where(torch.arange(G) % 2 == 0, 30, -10).to(torch.int8)
    packed[:, 3 * g // 4 :] = 0
    emulation.run(name, inputs, [layer])
    expected = layer.expected(inputs.value(), case).to(layer.y.dtype)
    assert expected.abs().max() < 2**10
    assert torch.equal(layer.y, expected)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """All cases, compiled for the GPU."""
    return compile_cases(CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_wgmma_equals_float64_and_itself_on_the_gpu(kernels: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    run_on_gpu(kernels[name], inputs.tensors(), layers)
    first = [layer.y for layer in layers]
    for layer in layers:
        layer.assert_right(inputs.value(), case)
        assert layer.status.tolist() == [0, 0]
    # The parts of K are summed in one order, whichever block is first.
    for _ in range(3):
        run_on_gpu(kernels[name], inputs.tensors(), layers)
        assert all(torch.equal(layer.y, y) for layer, y in zip(layers, first, strict=True))
    (inputs.x[0] if inputs.scale is None else inputs.scale)[0] = torch.nan
    run_on_gpu(kernels[name], inputs.tensors(), layers)
    for layer in layers:
        assert not layer.y[0].isfinite().any()
        assert layer.y[1:].isfinite().all()
        assert layer.status.tolist() == [1, 0]
