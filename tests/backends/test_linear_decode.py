"""linear_decode.cuh on the CPU: what it computes, what it compiles to, and how its work is shared out."""

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ternarize.config import Activation
from ternarize.packing import dequantize, pack
from tests.backends.decode_kit import CASES, EPS, Besides, DecodeCase
from tests.backends.hopper_kit import (
    Inputs,
    Operands,
    addresses,
    assert_compiles,
    compile_emulation,
    emulate,
    layer_shape,
    lower,
    run_on_gpu,
)


def _call(case: DecodeCase, index: int) -> str:
    """C++ that runs a case: run_INDEX(x, scale, norm_weight, residual, M, pointers of the layers in their order)."""
    from ternarize.backends.tilelang.linear_decode import FUSED, decode_function

    tile = case.decode_tile()
    assert "norm" not in case.fused or tile.normalises(case.K)
    layers = ", ".join(
        "ternarize::layer({}, {})".format(layer.N, ", ".join(f"p[{7 * i + j}]" for j in range(7)))
        for i, layer in enumerate(case.layers)
    )
    function = decode_function(
        case.layers, case.K, case.g, case.dtype, guarded=True, tile=tile, activation=case.activation
    )
    shared_bytes = tile.shared_bytes(case.layers, case.K, case.g, case.activation)
    what = sum(FUSED[name] for name in case.fused)
    return f"""
    extern "C" const char* run_{index}(void* x, void* scale, void* norm_weight, void* residual, int M, void** p) {{
      return emulated::run({tile.CLUSTERS}, {tile.CLUSTER}, {32 * tile.WARPS}, {shared_bytes}, [&](uint8_t* shared) {{
        {function}(x, scale, shared, M, ternarize::fused(norm_weight, residual, {EPS}, {what}), {layers});
      }});
    }}"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases, compiled for the CPU."""
    from ternarize.backends.tilelang import linear_decode

    kernels = [Path(linear_decode.__file__).with_name(name) for name in linear_decode.SOURCES if name != "hopper.cuh"]
    functions = [_call(case, index) for index, case in enumerate(CASES.values())]
    return compile_emulation("emulated_hopper.h", kernels, functions, tmp_path_factory.mktemp("emulation"))


def _emulate(
    library: ctypes.CDLL, name: str, inputs: Inputs, layers: Sequence[Operands], besides: Besides | None = None
) -> None:
    besides = besides or Besides.random(CASES[name])
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    shared = [inputs.x, inputs.scale, besides.norm_weight, besides.residual]
    pointers = (ctypes.c_void_p(address) for address in addresses(shared))
    function = f"run_{list(CASES).index(name)}"
    emulate(library, function, [*shared, *tensors], *pointers, inputs.x.shape[0], addresses(tensors))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fused])
def test_decode_equals_float64(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    _emulate(emulation, name, inputs, layers)
    for layer in layers:
        layer.assert_right(case.multiplied(inputs.value()), case)
        assert layer.status.tolist() == [0, 0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fused])
def test_what_decode_does_besides_equals_float64(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    besides = Besides.random(case)
    _emulate(emulation, name, inputs, layers, besides)
    besides.assert_right(inputs.value(), case, layers)
    assert all(layer.status.tolist() == [0, 0] for layer in layers)


@pytest.mark.parametrize("name", ["digits", "digits, groups of 64"])
def test_a_large_value_takes_no_bits_from_the_others(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    x = torch.randn(case.M, case.K)
    # One in each chunk of 128 weights, where no row has a weight.
    x[:, ::128] = 2.0**9
    levels = dequantize(layer.T_packed, torch.zeros_like(layer.E), None, case.K, case.g, torch.int8)
    levels[:, ::128] = 0
    layer.T_packed = pack(levels, case.g)
    inputs = Inputs(x=x.to(getattr(torch, case.dtype)))
    _emulate(emulation, name, inputs, [layer])
    layer.assert_right(inputs.value(), case)


@pytest.mark.parametrize("name", ["rounded", "rounded, 16 tokens"])
def test_halfway_between_two_integers_is_rounded_as_everywhere(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    layers = [Operands.random(layer, case) for layer in case.layers]
    # Halves of integers, after the largest has become 127.
    x = torch.randint(-254, 255, (case.M, case.K)) / 128
    x[:, 5] = 127 / 64
    inputs = Inputs(x=x.to(getattr(torch, case.dtype)))
    _emulate(emulation, name, inputs, layers)
    for layer in layers:
        layer.assert_right(case.multiplied(inputs.value()), case)


@pytest.mark.parametrize(
    "name",
    ["three layers", "digits, three layers", "digits, groups of 64", "rounded, three layers", "int8, three layers"],
)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_decode_reports_a_result_that_is_not_finite(emulation: ctypes.CDLL, name: str, value: float) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    if inputs.scale is None:
        inputs.x[0, 300] = value
    else:
        inputs.scale[0] = value
    _emulate(emulation, name, inputs, layers)
    for layer in layers:
        assert not layer.y[0].isfinite().any()
        assert layer.y[1:].isfinite().all()
        assert layer.status.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["one token", "digits"])
def test_decode_holds_over_the_whole_range_of_exponents(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    G = layer.E.shape[1]
    exponents = torch.linspace(-126, 127, G).round()
    layer.E[:] = exponents
    # Up to 2^115: twice a group of x is summed before the sum is scaled.
    x = torch.randn(case.M, case.K) * torch.exp2(-exponents.clamp(-115, 124)).repeat_interleave(case.g)[: case.K]
    inputs = Inputs(x=x.bfloat16())
    _emulate(emulation, name, inputs, [layer])
    layer.assert_right(inputs.value(), case)


@pytest.mark.parametrize("name", ["int8", "int8, groups of 64", "int8, the longest row"])
def test_int8_sums_are_exact_at_every_exponent(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    ends = (-126, 127) if case.dtype == "bfloat16" else (-30, 10)
    (layer,) = [Operands.random(layer, case) for layer in case.layers]
    # One exponent a row, and a scale that is a power of two: all that is rounded is the result.
    layer.E[:] = torch.linspace(*ends, len(layer.E)).round()[:, None]
    inputs = Inputs.random(case)
    # As small as the quantiser's least, so that the results are finite.
    inputs.scale = torch.full((case.M,), 2.0**-24)
    # The largest sum that there is, of trits that are all not 0, at the largest exponent.
    layer.T_packed[-1] |= 0x55
    T = dequantize(layer.T_packed, torch.zeros_like(layer.E), None, case.K, case.g, torch.float32)
    inputs.x[0] = torch.where(T[-1] < 0, -128, 127).to(torch.int8)
    _emulate(emulation, name, inputs, [layer])
    expected = layer.expected(inputs.value(), case).to(layer.y.dtype)
    assert expected.isfinite().all()
    assert torch.equal(layer.y, expected)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """All cases, compiled for the GPU."""
    import tilelang

    from ternarize.backends.tilelang.hopper import TARGET
    from ternarize.backends.tilelang.linear_decode import decode_program

    programs = [
        decode_program(
            case.layers,
            case.K,
            case.g,
            case.dtype,
            guarded=True,
            tile=case.decode_tile(),
            activation=case.activation,
        )
        for case in CASES.values()
    ]
    return dict(zip(CASES, tilelang.par_compile(programs, target=TARGET), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_decode_equals_float64_and_itself_on_the_gpu(kernels: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    besides = Besides.random(case)
    last = [] if case.activation == "int8" else besides.arguments(case)
    run_on_gpu(kernels[name], inputs.tensors(), layers, last)
    first = [layer.y for layer in layers]
    assert all(layer.status.tolist() == [0, 0] for layer in layers)
    if case.fused:
        besides.assert_right(inputs.value(), case, layers)
    else:
        for layer in layers:
            layer.assert_right(case.multiplied(inputs.value()), case)
    # The parts of K are summed in one order, whichever warp is first.
    for _ in range(3):
        run_on_gpu(kernels[name], inputs.tensors(), layers, last)
        same = (
            torch.allclose(layer.y, y, rtol=0, atol=0, equal_nan=True) for layer, y in zip(layers, first, strict=True)
        )
        assert all(same)
    (inputs.x[0] if inputs.scale is None else inputs.scale)[0] = torch.nan
    run_on_gpu(kernels[name], inputs.tensors(), layers, last)
    assert all(layer.status.tolist() == [1, 0] for layer in layers)


@pytest.mark.parametrize(
    ("M", "layers", "K", "g", "guarded", "activation"),
    [
        (1, (layer_shape(4096), layer_shape(1024, bias=True), layer_shape(1024)), 4096, 128, False, "float"),
        (8, (layer_shape(333, planes=3, mantissa="int16", bias=True),), 1152, 64, True, "float"),
        (1, (layer_shape(4096), layer_shape(1024, bias=True), layer_shape(1024)), 4096, 128, False, "int8"),
        (16, (layer_shape(14336), layer_shape(333, bias=True)), 4096, 128, True, "int8"),
        (16, (layer_shape(333, bias=True),), 1152, 64, True, "int8"),
    ],
)
def test_the_program_passes_its_arguments_in_order_and_compiles(
    tmp_path: Path, M: int, layers: tuple[Any, ...], K: int, g: int, guarded: bool, activation: Activation
) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile, decode_program

    tile = choose_decode_tile(M, layers, K, g, activation)
    assert tile is not None
    source = lower(decode_program(layers, K, g, "bfloat16", guarded=guarded, tile=tile, activation=activation))
    call = source[source.rindex("ternarize::linear_decode<") :].split(";")[0]
    expected = ["x", *["scale"] * (activation == "int8"), "shared"]
    for i, layer in enumerate(layers):
        expected += [f"T_packed_{i}", f"E_{i}"] + [f"E_mantissa_{i}"] * (layer.mantissa is not None)
        expected += [f"bias_{i}", f"bias_exponent_{i}"] * layer.bias + [f"status_{i}"] * guarded + [f"y_{i}"]
    if activation == "float":
        expected[2:2] = ["norm_weight"] + ["residual"] * (len(layers) == 1)
        assert "norm_eps, what)" in call
    assert [name.strip("&()") for name in re.findall(r"&\(\w+", call)] == expected
    assert f"__launch_bounds__({32 * tile.WARPS}, 1)" in source
    # Without a wait that TileLang sees, it does not launch the kernel as dependent.
    assert "cudaGridDependencySynchronize" in source
    assert_compiles(source, tmp_path)


@pytest.mark.parametrize(
    ("M", "out_features", "K", "g"),
    [
        (1, (4096,), 4096, 128),
        (8, (4096, 1024, 1024), 4096, 128),
        (8, (8192,), 28672, 128),
        (5, (8192,), 28672, 128),
        (1, (1,), 128, 128),
        (3, (1000,), 1152, 64),
        (8, (1536,), 8960, 8960),
    ],
)
def test_a_tile_shares_out_all_work_and_fits(M: int, out_features: tuple[int, ...], K: int, g: int) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile

    layers = tuple(layer_shape(N) for N in out_features)
    tile = choose_decode_tile(M, layers, K, g)
    assert tile is not None
    assert M <= tile.TOKENS
    # No block, and no warp that K is split over, is without work.
    assert -(-K // 512) >= tile.CLUSTER * tile.K_WARPS
    assert tile.row_blocks(layers) >= tile.CLUSTERS
    assert tile.WARPS % tile.K_WARPS == 0
    assert tile.shared_bytes(layers, K, g, "float") <= 227 * 1024


@pytest.mark.parametrize(
    ("M", "layers", "activation", "digits"),
    [
        (1, (layer_shape(3072), layer_shape(1024)), "float", 3),
        (1, (layer_shape(4095),), "float", 0),
        (2, (layer_shape(8192),), "float", 3),
        (2, (layer_shape(8191),), "float", 0),
        (3, (layer_shape(28672),), "float", 0),
        (1, (layer_shape(28672, planes=2),), "float", 0),
        (1, (layer_shape(28672, mantissa="uint8"),), "float", 0),
        (1, (layer_shape(28672),), "int8", 0),
    ],
)
def test_digits_are_for_few_tokens_and_many_rows(
    M: int, layers: tuple[Any, ...], activation: Activation, digits: int
) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile

    tile = choose_decode_tile(M, layers, 4096, 128, activation)
    assert tile is not None
    assert digits == tile.DIGITS


@pytest.mark.parametrize(
    ("M", "N", "K", "activation", "cluster", "ahead"),
    [
        (4, 14336, 4096, "int8", 1, 2),
        (4, 28672, 8192, "int8", 2, 2),
        (8, 14336, 4096, "int8", 2, 1),
        (8, 8192, 28672, "int8", 8, 1),
        (16, 14336, 4096, "int8", 4, 1),
        (16, 4096, 14336, "int8", 8, 1),
        # More rows than clusters of eight are good for.
        (16, 28672, 8192, "int8", 4, 1),
        (8, 14336, 4096, "float", 1, 2),
        (8, 28672, 8192, "float", 2, 2),
    ],
)
def test_the_tile_is_the_one_that_was_measured_to_be_fast(
    M: int, N: int, K: int, activation: Activation, cluster: int, ahead: int
) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile

    tile = choose_decode_tile(M, (layer_shape(N),), K, 128, activation)
    assert tile is not None
    assert (cluster, ahead) == (tile.CLUSTER, tile.STAGES)


@pytest.mark.parametrize(
    ("M", "layers", "K", "g"),
    [
        (9, (layer_shape(64),), 4608, 128),
        (17, (layer_shape(64),), 4096, 128),
        (1, (layer_shape(64),), 4096, 32),
        (1, (layer_shape(64),), 4128, 128),
        (1, (layer_shape(64), layer_shape(64, planes=2)), 4096, 128),
        (1, (layer_shape(64), layer_shape(64, mantissa="uint8")), 4096, 128),
        # Half a gigabyte of x.
        (8, (layer_shape(64),), 2**24, 128),
    ],
)
def test_what_decode_does_not_serve_it_leaves_to_wgmma(M: int, layers: tuple[Any, ...], K: int, g: int) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile

    assert choose_decode_tile(M, layers, K, g) is None
