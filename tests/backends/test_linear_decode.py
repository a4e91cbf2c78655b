"""linear_decode.cuh on the CPU: what it computes, what it compiles to, and how its work is shared out."""

import ctypes
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ternarize.config import Activation
from ternarize.packing import dequantize, groups_per_row, pack

pytest.importorskip("tilelang", reason="TileLang is for Linux")

Dtype = Literal["bfloat16", "float16"]

#: Of one rounding to the dtype.
ROUNDING_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11}

HERE = Path(__file__).parent


def _layer(N: int, *, planes: int = 1, mantissa: str | None = None, bias: bool = False) -> Any:
    from ternarize.backends.tilelang.layers import LayerShape

    return LayerShape(N=N, planes=planes, mantissa=mantissa, bias=bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call, and how its work is shared out: the fields of DecodeTile that are not 1."""

    M: int
    layers: tuple[Any, ...]
    K: int
    g: int
    dtype: Dtype = "bfloat16"
    activation: Activation = "float"
    tile: dict[str, int] = dataclasses.field(default_factory=dict)

    def decode_tile(self) -> Any:
        from ternarize.backends.tilelang.linear_decode import DecodeTile

        least = dict.fromkeys((field.name for field in dataclasses.fields(DecodeTile)), 1)
        tokens = next(tokens for tokens in (1, 2, 4, 8, 16) if tokens >= self.M)
        digits = 1 if self.activation == "int8" else 0
        return DecodeTile(**{**least, "TOKENS": tokens, "DIGITS": digits, "STAGES": 2, "WARPS": 2, **self.tile})


CASES = {
    "one token": Case(M=1, layers=(_layer(16),), K=512, g=128),
    "K split over warps and blocks": Case(
        M=16, layers=(_layer(70, bias=True),), K=2048, g=128, tile={"TILES": 2, "CLUSTER": 2, "K_WARPS": 2}
    ),
    "three layers": Case(
        M=2,
        layers=(_layer(33, bias=True), _layer(5), _layer(17, bias=True)),
        K=1024,
        g=128,
        tile={"CLUSTERS": 3, "WARPS": 4, "K_WARPS": 2},
    ),
    "one row": Case(M=2, layers=(_layer(1),), K=1024, g=128, tile={"TILES": 2}),
    "float16": Case(M=8, layers=(_layer(20, bias=True),), K=1024, g=128, dtype="float16"),
    "part of a step": Case(M=3, layers=(_layer(40),), K=1152, g=128, tile={"STAGES": 3}),
    "groups of 64": Case(M=5, layers=(_layer(19),), K=1216, g=64, tile={"K_WARPS": 2}),
    "groups of 256, the last of 192": Case(M=2, layers=(_layer(19),), K=960, g=256),
    "the last group of 64": Case(M=2, layers=(_layer(19),), K=704, g=128, dtype="float16"),
    "a group a row": Case(M=2, layers=(_layer(19),), K=192, g=192),
    "two planes": Case(M=2, layers=(_layer(19, planes=2), _layer(35, planes=2)), K=512, g=64, dtype="float16"),
    "three planes": Case(M=2, layers=(_layer(19, planes=3),), K=1024, g=128),
    "mantissas of a byte": Case(M=1, layers=(_layer(19, mantissa="uint8"),), K=896, g=128),
    "mantissas of two bytes": Case(M=1, layers=(_layer(19, mantissa="int16"),), K=960, g=64),
    "mantissas of four bytes": Case(M=1, layers=(_layer(19, mantissa="int32"),), K=896, g=128, dtype="float16"),
    "digits": Case(M=1, layers=(_layer(19),), K=1088, g=128, tile={"DIGITS": 4, "K_WARPS": 2}),
    "digits of four tokens": Case(M=4, layers=(_layer(35, bias=True),), K=1024, g=256, tile={"DIGITS": 4, "TILES": 2}),
    "digits of float16": Case(
        M=2, layers=(_layer(19),), K=1024, g=128, dtype="float16", tile={"DIGITS": 4, "CLUSTER": 2}
    ),
    "int8": Case(M=1, layers=(_layer(19),), K=1088, g=128, activation="int8", tile={"K_WARPS": 2}),
    "int8, three layers": Case(
        M=5,
        layers=(_layer(33, bias=True), _layer(5), _layer(17, bias=True)),
        K=704,
        g=128,
        activation="int8",
        tile={"TILES": 2, "CLUSTER": 2},
    ),
    "int8, groups of 64": Case(
        M=16, layers=(_layer(19),), K=1216, g=64, dtype="float16", activation="int8", tile={"K_WARPS": 2}
    ),
    "int8, groups of 256": Case(M=2, layers=(_layer(19, bias=True),), K=960, g=256, activation="int8"),
    "int8, a group a row": Case(M=2, layers=(_layer(19),), K=192, g=192, activation="int8"),
    "int8, the longest row": Case(M=1, layers=(_layer(2),), K=2**17 - 64, g=128, activation="int8"),
}


def _call(case: Case, index: int) -> str:
    """C++ that runs a case: run_INDEX(x, scale, M, the pointers of the layers in the order of ``layer``)."""
    from ternarize.backends.tilelang.linear_decode import decode_function

    tile = case.decode_tile()
    layers = ", ".join(
        "ternarize::layer({}, {})".format(layer.N, ", ".join(f"p[{7 * i + j}]" for j in range(7)))
        for i, layer in enumerate(case.layers)
    )
    function = decode_function(
        case.layers, case.K, case.g, case.dtype, guarded=True, tile=tile, activation=case.activation
    )
    shared_bytes = tile.shared_bytes(case.layers, case.K, case.g)
    return f"""
    extern "C" const char* run_{index}(void* x, void* scale, int M, void** p) {{
      return emulated::run({tile.CLUSTERS}, {tile.CLUSTER}, {32 * tile.WARPS}, {shared_bytes}, [&](uint8_t* shared) {{
        {function}(x, scale, shared, M, {layers});
      }});
    }}"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases, compiled for the CPU."""
    from ternarize.backends.tilelang import linear_decode

    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    folder = tmp_path_factory.mktemp("emulation")
    sources = [
        Path(linear_decode.__file__).with_name(name)
        for name in ("numbers.cuh", "linear_decode_x.cuh", "linear_decode.cuh")
    ]
    text = [f'#include "{path}"\n' for path in (HERE / "emulated_hopper.h", *sources)]
    text += ['extern "C" void set_tensors(const emulated::Range* ranges, int count) {']
    text += ["  emulated::tensors.assign(ranges, ranges + count);\n}"]
    text += [_call(case, index) for index, case in enumerate(CASES.values())]
    (folder / "cases.cpp").write_text("\n".join(text))
    command = "g++ -std=c++20 -O1 -shared -fPIC -pthread -Wno-unknown-pragmas cases.cpp -o cases.so"
    result = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(folder / "cases.so"))


@dataclasses.dataclass(kw_only=True)
class Operands:
    """The tensors of a layer, in the order of ``layer`` of linear_decode.cuh."""

    T_packed: Tensor
    E: Tensor
    E_mantissa: Tensor | None
    bias: Tensor | None
    bias_exponent: Tensor | None
    status: Tensor
    y: Tensor

    @classmethod
    def random(cls, layer: Any, case: Case) -> "Operands":
        G = groups_per_row(case.K, case.g)
        T = torch.randint(-1, 2, (layer.planes, layer.N, case.K), dtype=torch.int8)
        mantissa = layer.mantissa and torch.randint(1, 100, (layer.N, G)).to(getattr(torch, layer.mantissa))
        return cls(
            T_packed=pack(T if layer.planes > 1 else T[0], case.g),
            E=torch.randint(-9, -3, (layer.N, G), dtype=torch.int8),
            E_mantissa=mantissa,
            bias=torch.randint(-(2**31), 2**31, (layer.N,)).int() if layer.bias else None,
            bias_exponent=torch.tensor([-30], dtype=torch.int8) if layer.bias else None,
            status=torch.zeros(2, dtype=torch.int32),
            y=torch.full((case.M, layer.N), torch.nan, dtype=getattr(torch, case.dtype)),
        )

    def expected(self, inputs: "Inputs", case: Case) -> Tensor:
        x = inputs.x.double() if inputs.scale is None else inputs.x.double() * inputs.scale.double()[:, None]
        y = x @ dequantize(self.T_packed, self.E, self.E_mantissa, case.K, case.g, torch.float64).mT
        if self.bias is None or self.bias_exponent is None:
            return y
        return y + torch.ldexp(self.bias.double(), self.bias_exponent)

    def cuda(self) -> "Operands":
        moved: dict[str, Any] = {name: t if t is None else t.cuda() for name, t in vars(self).items()}
        return Operands(**moved)

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


@dataclasses.dataclass(kw_only=True)
class Inputs:
    """What the layers of a call share."""

    x: Tensor
    """[M, K] in the dtype of the case, or int8."""
    scale: Tensor | None = None
    """float32 [M], of int8."""

    @classmethod
    def random(cls, case: Case) -> "Inputs":
        """Groups of different magnitude, so that a scale of the wrong group shows."""
        if case.activation == "int8":
            x = torch.randint(-128, 128, (case.M, case.K), dtype=torch.int8)
            return cls(x=x, scale=torch.exp2(torch.rand(case.M) * 8 - 4))
        G = groups_per_row(case.K, case.g)
        magnitude = torch.exp2(torch.randint(-6, 7, (case.M, G)).float()).repeat_interleave(case.g, 1)[:, : case.K]
        return cls(x=(torch.randn(case.M, case.K) * magnitude).to(getattr(torch, case.dtype)))

    def tensors(self) -> list[Tensor]:
        return [self.x] if self.scale is None else [self.x, self.scale]


def _emulate(library: ctypes.CDLL, name: str, inputs: Inputs, layers: Sequence[Operands]) -> None:
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    named = [tensor for tensor in (*inputs.tensors(), *tensors) if tensor is not None]
    bounds = [bound for t in named for bound in (t.data_ptr(), t.data_ptr() + t.nbytes)]
    library.set_tensors((ctypes.c_void_p * len(bounds))(*bounds), len(named))
    x, scale, *pointers = [0 if t is None else t.data_ptr() for t in (inputs.x, inputs.scale, *tensors)]
    run = library[f"run_{list(CASES).index(name)}"]
    run.restype = ctypes.c_char_p
    given = (ctypes.c_void_p * len(pointers))(*pointers)
    failure = run(ctypes.c_void_p(x), ctypes.c_void_p(scale), inputs.x.shape[0], given)
    assert failure is None, failure


def _assert_right(layer: Operands, inputs: Inputs, case: Case) -> None:
    expected = layer.expected(inputs, case)
    float32_error = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(layer.y.double(), expected, rtol=ROUNDING_ERROR[case.dtype], atol=float32_error)


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_float64(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    _emulate(emulation, name, inputs, layers)
    for layer in layers:
        _assert_right(layer, inputs, case)
        assert layer.status.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["three layers", "digits", "int8, three layers"])
def test_decode_reports_a_result_that_is_not_finite(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    inputs, layers = Inputs.random(case), [Operands.random(layer, case) for layer in case.layers]
    if inputs.scale is None:
        inputs.x[0, 300] = torch.inf
    else:
        inputs.scale[0] = torch.inf
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
    _assert_right(layer, inputs, case)


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
    expected = layer.expected(inputs, case).to(layer.y.dtype)
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

    def run(inputs: Inputs) -> None:
        on_gpu = [layer.cuda() for layer in layers]
        given = [tensor for layer in on_gpu for tensor in layer.tensors()[:-1] if tensor is not None]
        kernels[name](*(tensor.cuda() for tensor in inputs.tensors()), *given, *(layer.y for layer in on_gpu))
        for layer, result in zip(layers, on_gpu, strict=True):
            layer.y, layer.status = result.y.cpu(), result.status.cpu()

    run(inputs)
    first = [layer.y for layer in layers]
    for layer in layers:
        _assert_right(layer, inputs, case)
        assert layer.status.tolist() == [0, 0]
    # The parts of K are summed in one order, whichever warp is first.
    for _ in range(3):
        run(inputs)
        assert all(torch.equal(layer.y, y) for layer, y in zip(layers, first, strict=True))
    (inputs.x[0] if inputs.scale is None else inputs.scale)[0] = torch.nan
    run(inputs)
    assert all(layer.status.tolist() == [1, 0] for layer in layers)


def _lower(program: Any) -> str:
    import tilelang

    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        return str(tilelang.lower(program, target=target).kernel_source)


@pytest.mark.parametrize(
    ("M", "layers", "K", "g", "guarded", "activation"),
    [
        (1, (_layer(4096), _layer(1024, bias=True), _layer(1024)), 4096, 128, False, "float"),
        (16, (_layer(333, planes=3, mantissa="int16", bias=True),), 1152, 64, True, "float"),
        (1, (_layer(4096), _layer(1024, bias=True), _layer(1024)), 4096, 128, False, "int8"),
        (16, (_layer(14336), _layer(333, bias=True)), 4096, 128, True, "int8"),
        (16, (_layer(333, bias=True),), 1152, 64, True, "int8"),
    ],
)
def test_the_program_passes_its_arguments_in_order_and_compiles(
    tmp_path: Path, M: int, layers: tuple[Any, ...], K: int, g: int, guarded: bool, activation: Activation
) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile, decode_program

    tile = choose_decode_tile(M, layers, K, g, "bfloat16", activation)
    assert tile is not None
    source = _lower(decode_program(layers, K, g, "bfloat16", guarded=guarded, tile=tile, activation=activation))
    call = source[source.rindex("ternarize::linear_decode<") :].split(";")[0]
    expected = ["x", *["scale"] * (activation == "int8"), "shared"]
    for i, layer in enumerate(layers):
        expected += [f"T_packed_{i}", f"E_{i}"] + [f"E_mantissa_{i}"] * (layer.mantissa is not None)
        expected += [f"bias_{i}", f"bias_exponent_{i}"] * layer.bias + [f"status_{i}"] * guarded + [f"y_{i}"]
    assert [name.strip("&()") for name in re.findall(r"&\(\w+", call)] == expected
    assert f"__launch_bounds__({32 * tile.WARPS}, {tile.blocks_per_multiprocessor})" in source
    # Without a wait that TileLang sees, it does not launch the kernel as dependent.
    assert "cudaGridDependencySynchronize" in source
    _assert_compiles(source, tmp_path)


def _assert_compiles(source: str, folder: Path) -> None:
    """As TileLang compiles, without spills."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    if shutil.which("nvcc") is None:
        pytest.skip("lowered; no nvcc on PATH to compile it with")
    (folder / "kernel.cu").write_text(source)
    command = (
        "nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -DENABLE_BF16 -Xptxas=-v "
        f"-I{TILELANG_TEMPLATE_PATH} -I{CUTLASS_INCLUDE_DIR} --cubin kernel.cu"
    )
    result = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in result.stderr


@pytest.mark.parametrize(
    ("M", "out_features", "K", "g"),
    [
        (1, (4096,), 4096, 128),
        (16, (4096, 1024, 1024), 4096, 128),
        (8, (8192,), 28672, 128),
        (16, (8192,), 28672, 128),
        (1, (1,), 128, 128),
        (9, (1000,), 1152, 64),
        (16, (1536,), 8960, 8960),
    ],
)
def test_a_tile_shares_out_all_work_and_fits(M: int, out_features: tuple[int, ...], K: int, g: int) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile

    layers = tuple(_layer(N) for N in out_features)
    tile = choose_decode_tile(M, layers, K, g, "bfloat16")
    assert tile is not None
    assert M <= tile.TOKENS
    # No block, and no warp that K is split over, is without work.
    assert -(-K // 512) >= tile.CLUSTER * tile.K_WARPS
    assert tile.row_blocks(layers) >= tile.CLUSTERS
    assert tile.WARPS % tile.K_WARPS == 0
    assert tile.blocks_per_multiprocessor * (tile.shared_bytes(layers, K, g) + 1024) <= 228 * 1024


@pytest.mark.parametrize(
    ("M", "layers", "K", "g"),
    [
        (17, (_layer(64),), 4096, 128),
        (1, (_layer(64),), 4096, 32),
        (1, (_layer(64),), 4128, 128),
        (1, (_layer(64), _layer(64, planes=2)), 4096, 128),
        (1, (_layer(64), _layer(64, mantissa="uint8")), 4096, 128),
        # Half a gigabyte of x.
        (16, (_layer(64),), 2**24, 128),
    ],
)
def test_what_decode_does_not_serve_it_leaves_to_wgmma(M: int, layers: tuple[Any, ...], K: int, g: int) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile

    assert choose_decode_tile(M, layers, K, g, "bfloat16") is None
