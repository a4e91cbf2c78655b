"""What the tests of kernels that are written in CUDA C++ share: cases, their tensors, the emulation, the compiler."""

import ctypes
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ternarize.config import Activation
from ternarize.packing import dequantize, groups_per_row, pack

Dtype = Literal["bfloat16", "float16"]

#: Of one rounding to the dtype.
ROUNDING_ERROR = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def layer_shape(N: int, *, planes: int = 1, mantissa: str | None = None, bias: bool = False) -> Any:
    """LayerShape of ternarize.backends.tilelang.layers, imported late: TileLang takes a second."""
    from ternarize.backends.tilelang.layers import LayerShape

    return LayerShape(N=N, planes=planes, mantissa=mantissa, bias=bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call, and how its work is shared out: fields of the tile."""

    M: int
    layers: tuple[Any, ...]
    K: int
    g: int
    dtype: Dtype = "bfloat16"
    activation: Activation = "float"
    tile: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True)
class Operands:
    """The tensors of a layer, in the order of a kernel's call."""

    T_packed: Tensor
    E: Tensor
    E_mantissa: Tensor | None
    bias: Tensor | None
    bias_exponent: Tensor | None
    status: Tensor
    y: Tensor

    @classmethod
    def random(cls, layer: Any, case: Case) -> "Operands":
        """Exponents about -6, y not a number, and as much bias as it takes to show."""
        G = groups_per_row(case.K, case.g)
        T = torch.randint(-1, 2, (layer.planes, layer.N, case.K), dtype=torch.int8)
        E = torch.randint(-9, -3, (layer.N, G), dtype=torch.int8)
        mantissa = layer.mantissa and torch.randint(1, 100, (layer.N, G)).to(getattr(torch, layer.mantissa))
        return cls(
            T_packed=pack(T if layer.planes > 1 else T[0], case.g),
            E=E,
            E_mantissa=mantissa,
            bias=torch.randint(-(2**31), 2**31, (layer.N,)).int() if layer.bias else None,
            bias_exponent=torch.tensor([-30], dtype=torch.int8) if layer.bias else None,
            status=torch.zeros(2, dtype=torch.int32),
            y=torch.full((case.M, layer.N), torch.nan, dtype=getattr(torch, case.dtype)),
        )

    def expected(self, x: Tensor, case: Case) -> Tensor:
        """y in float64, of x in any dtype."""
        y = x.double() @ dequantize(self.T_packed, self.E, self.E_mantissa, case.K, case.g, torch.float64).mT
        if self.bias is None or self.bias_exponent is None:
            return y
        return y + torch.ldexp(self.bias.double(), self.bias_exponent)

    def cuda(self) -> "Operands":
        moved: dict[str, Any] = {name: t if t is None else t.cuda() for name, t in vars(self).items()}
        return Operands(**moved)

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def assert_right(self, x: Tensor, case: Case) -> None:
        expected = self.expected(x, case)
        float32_error = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(self.y.double(), expected, rtol=ROUNDING_ERROR[case.dtype], atol=float32_error)


def random_x(case: Case) -> Tensor:
    """Groups of different magnitude, so that a scale of the wrong group shows."""
    G = groups_per_row(case.K, case.g)
    magnitude = torch.exp2(torch.randint(-6, 7, (case.M, G)).float()).repeat_interleave(case.g, 1)[:, : case.K]
    return (torch.randn(case.M, case.K) * magnitude).to(getattr(torch, case.dtype))


@dataclasses.dataclass(kw_only=True)
class Inputs:
    """What the layers of a call share."""

    x: Tensor
    """[M, K] in the dtype of the case, or int8."""
    scale: Tensor | None = None
    """float32 [M], of int8."""

    @classmethod
    def random(cls, case: Case) -> "Inputs":
        if case.activation == "float":
            return cls(x=random_x(case))
        x = torch.randint(-128, 128, (case.M, case.K), dtype=torch.int8)
        return cls(x=x, scale=torch.exp2(torch.rand(case.M) * 8 - 4))

    def value(self) -> Tensor:
        """What x stands for, in float64."""
        return self.x.double() if self.scale is None else self.x.double() * self.scale.double()[:, None]

    def tensors(self) -> list[Tensor]:
        return [self.x] if self.scale is None else [self.x, self.scale]


# On the CPU.


def compile_emulation(header: str, kernels: list[Path], functions: Iterable[str], folder: Path) -> ctypes.CDLL:
    """Compile for the CPU what is CUDA C++.

    Args:
        header: an emulated_*.h, which takes the place of the headers that have instructions of the GPU.
        kernels: .cuh, in their order.
        functions: C++ that calls the kernels; each returns what `emulated::run` does.
        folder: for what is compiled.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    text = [f'#include "{path}"\n' for path in (Path(__file__).with_name(header), *kernels)]
    text += ['extern "C" void set_tensors(const emulated::Range* ranges, int count) {']
    text += ["  emulated::tensors.assign(ranges, ranges + count);\n}", *functions]
    (folder / "cases.cpp").write_text("\n".join(text))
    command = "g++ -std=c++20 -O1 -shared -fPIC -Wno-unknown-pragmas cases.cpp -o cases.so"
    result = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(folder / "cases.so"))


def addresses(tensors: Iterable[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Pointers for a function of the emulation; null for None."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(pointers))(*pointers)


def emulate(library: ctypes.CDLL, function: str, readable: Iterable[Tensor | None], *arguments: Any) -> None:
    """Run a kernel, and fail with what it did wrong, if anything.

    Args:
        library: of `compile_emulation`.
        function: its name.
        readable: what the kernel may read.
        arguments: of the function.
    """
    bounds = [
        bound
        for tensor in readable
        if tensor is not None
        for bound in (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    ]
    library.set_tensors((ctypes.c_void_p * len(bounds))(*bounds), len(bounds) // 2)
    run = library[function]
    run.restype = ctypes.c_char_p
    failure = run(*arguments)
    assert failure is None, failure.decode()


class TensorMap(ctypes.Structure):
    """CUtensorMap of emulated_wgmma.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("extents", ctypes.c_int64 * 3),
        ("box", ctypes.c_int * 3),
        ("element_bytes", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("written_by_previous_kernel", ctypes.c_int),
    )

    @classmethod
    def of(cls, tensor: Tensor, box: tuple[int, ...], *, written: bool = False) -> "TensorMap":
        size = tensor.element_size()
        extents, sizes = ((*reversed(each), 1)[:3] for each in (tensor.shape, box))
        return cls(tensor.data_ptr(), extents, sizes, size, box[-1] * size, written)


# For the GPU.


def run_on_gpu(kernel: Any, inputs: list[Tensor], layers: list[Operands], last: Sequence[Any] = ()) -> None:
    """Call a compiled program with what the layers share, all of theirs, and ``last``; take over y and status."""
    on_gpu = [layer.cuda() for layer in layers]
    given = [tensor for layer in on_gpu for tensor in layer.tensors()[:-1] if tensor is not None]
    last = [value.cuda() if isinstance(value, Tensor) else value for value in last]
    kernel(*(tensor.cuda() for tensor in inputs), *given, *(layer.y for layer in on_gpu), *last)
    for layer, result in zip(layers, on_gpu, strict=True):
        layer.y, layer.status = result.y.cpu(), result.status.cpu()


def lower(program: Any) -> str:
    """The CUDA C++ of a TileLang program."""
    import tilelang

    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        return str(tilelang.lower(program, target=target).kernel_source)


def assert_compiles(source: str, folder: Path) -> None:
    """As TileLang compiles, without spills, and without a complaint of ptxas about wgmma."""
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
    assert set(re.findall(r"(\d+) bytes spill", result.stderr)) == {"0"}
    # It says so when it has to wait after every wgmma (C7510, C7511) or ignores setmaxnreg (C7508).
    assert "C75" not in result.stderr
