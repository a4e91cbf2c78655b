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
    tile: dict[str, int] = dataclasses.field(default_factory=dict)

    def decode_tile(self) -> Any:
        from ternarize.backends.tilelang.linear_decode import DecodeTile

        least = dict.fromkeys((field.name for field in dataclasses.fields(DecodeTile)), 1)
        tokens = next(tokens for tokens in (1, 2, 4, 8, 16) if tokens >= self.M)
        return DecodeTile(**{**least, "TOKENS": tokens, "DIGITS": 0, "STAGES": 2, "WARPS": 2, **self.tile})


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
}


def _call(case: Case, index: int) -> str:
    """C++ that runs a case, as the function run_INDEX(x, M, the pointers of the layers in the order of ``layer``)."""
    from ternarize.backends.tilelang.linear_decode import decode_function

    tile = case.decode_tile()
    layers = ", ".join(
        "ternarize::layer({}, {})".format(layer.N, ", ".join(f"p[{7 * i + j}]" for j in range(7)))
        for i, layer in enumerate(case.layers)
    )
    function = decode_function(case.layers, case.K, case.g, case.dtype, guarded=True, tile=tile)
    shared_bytes = tile.shared_bytes(case.layers, case.K, case.g)
    return f"""
    extern "C" const char* run_{index}(void* x, int M, void** p) {{
      return emulated::run({tile.CLUSTERS}, {tile.CLUSTER}, {32 * tile.WARPS}, {shared_bytes}, [&](uint8_t* shared) {{
        {function}(x, shared, M, {layers});
      }});
    }}"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All cases, compiled for the CPU."""
    from ternarize.backends.tilelang import linear_decode

    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    folder = tmp_path_factory.mktemp("emulation")
    sources = [Path(linear_decode.__file__).with_name(name) for name in ("numbers.cuh", "linear_decode.cuh")]
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

    def expected(self, x: Tensor, case: Case) -> Tensor:
        y = x.double() @ dequantize(self.T_packed, self.E, self.E_mantissa, case.K, case.g, torch.float64).mT
        if self.bias is None or self.bias_exponent is None:
            return y
        return y + torch.ldexp(self.bias.double(), self.bias_exponent)

    def cuda(self) -> "Operands":
        moved: dict[str, Any] = {name: t if t is None else t.cuda() for name, t in vars(self).items()}
        return Operands(**moved)

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _emulate(library: ctypes.CDLL, name: str, x: Tensor, layers: Sequence[Operands]) -> None:
    tensors = [tensor for layer in layers for tensor in layer.tensors()]
    bounds = [bound for t in (x, *tensors) if t is not None for bound in (t.data_ptr(), t.data_ptr() + t.nbytes)]
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    library.set_tensors((ctypes.c_void_p * len(bounds))(*bounds), len(bounds) // 2)
    run = library[f"run_{list(CASES).index(name)}"]
    run.restype = ctypes.c_char_p
    failure = run(ctypes.c_void_p(x.data_ptr()), x.shape[0], (ctypes.c_void_p * len(pointers))(*pointers))
    assert failure is None, failure


def _assert_right(layer: Operands, x: Tensor, case: Case) -> None:
    expected = layer.expected(x, case)
    float32_error = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(layer.y.double(), expected, rtol=ROUNDING_ERROR[case.dtype], atol=float32_error)


def _random_x(case: Case) -> Tensor:
    """Groups of different magnitude, so that a scale of the wrong group shows."""
    G = groups_per_row(case.K, case.g)
    magnitude = torch.exp2(torch.randint(-6, 7, (case.M, G)).float()).repeat_interleave(case.g, 1)[:, : case.K]
    return (torch.randn(case.M, case.K) * magnitude).to(getattr(torch, case.dtype))


@pytest.mark.parametrize("name", CASES)
def test_decode_equals_float64(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, layers = _random_x(case), [Operands.random(layer, case) for layer in case.layers]
    _emulate(emulation, name, x, layers)
    for layer in layers:
        _assert_right(layer, x, case)
        assert layer.status.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["three layers", "digits"])
def test_decode_reports_a_result_that_is_not_finite(emulation: ctypes.CDLL, name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, layers = _random_x(case), [Operands.random(layer, case) for layer in case.layers]
    x[0, 300] = torch.inf
    _emulate(emulation, name, x, layers)
    for layer in layers:
        assert not layer.y[0].isfinite().any()
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
    x = x.bfloat16()
    _emulate(emulation, name, x, [layer])
    _assert_right(layer, x, case)


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """All cases, compiled for the GPU."""
    import tilelang

    from ternarize.backends.tilelang.hopper import TARGET
    from ternarize.backends.tilelang.linear_decode import decode_program

    programs = [
        decode_program(case.layers, case.K, case.g, case.dtype, guarded=True, tile=case.decode_tile())
        for case in CASES.values()
    ]
    return dict(zip(CASES, tilelang.par_compile(programs, target=TARGET), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_decode_equals_float64_and_itself_on_the_gpu(kernels: dict[str, Any], name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    x, layers = _random_x(case), [Operands.random(layer, case) for layer in case.layers]

    def run(x: Tensor) -> None:
        on_gpu = [layer.cuda() for layer in layers]
        inputs = [tensor for layer in on_gpu for tensor in layer.tensors()[:-1] if tensor is not None]
        kernels[name](x.cuda(), *inputs, *(layer.y for layer in on_gpu))
        for layer, result in zip(layers, on_gpu, strict=True):
            layer.y, layer.status = result.y.cpu(), result.status.cpu()

    run(x)
    first = [layer.y for layer in layers]
    for layer in layers:
        _assert_right(layer, x, case)
        assert layer.status.tolist() == [0, 0]
    # The parts of K are summed in one order, whichever warp is first.
    for _ in range(3):
        run(x)
        assert all(torch.equal(layer.y, y) for layer, y in zip(layers, first, strict=True))
    x[0, 5] = torch.nan
    run(x)
    assert all(layer.status.tolist() == [1, 0] for layer in layers)


def _lower(program: Any) -> str:
    import tilelang

    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        return str(tilelang.lower(program, target=target).kernel_source)


@pytest.mark.parametrize(
    ("M", "layers", "K", "g", "guarded"),
    [
        (1, (_layer(4096), _layer(1024, bias=True), _layer(1024)), 4096, 128, False),
        (16, (_layer(333, planes=3, mantissa="int16", bias=True),), 1152, 64, True),
    ],
)
def test_the_program_passes_its_arguments_in_order_and_compiles(
    tmp_path: Path, M: int, layers: tuple[Any, ...], K: int, g: int, guarded: bool
) -> None:
    from ternarize.backends.tilelang.linear_decode import choose_decode_tile, decode_program

    tile = choose_decode_tile(M, layers, K, g, "bfloat16")
    assert tile is not None
    source = _lower(decode_program(layers, K, g, "bfloat16", guarded=guarded, tile=tile))
    call = source[source.rindex("ternarize::linear_decode<") :].split(";")[0]
    expected = ["x", "shared"]
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
