"""The TileLang kernels of `linear_int8`: what is compiled, without a GPU, and what they compute, on a Hopper GPU."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.activation import quantize_activation
from ternarize.backends import tilelang as backend
from ternarize.backends.select import Facts
from ternarize.packing import pack
from tests.backends.kit import assert_close, linear, linear_int8, random_weights

pytest.importorskip("tilelang", reason="TileLang is for Linux")


def _bytes(word: int) -> list[int]:
    """The four int8 of a register, lowest first."""
    return torch.tensor([word >> shift & 0xFF for shift in (0, 8, 16, 24)], dtype=torch.uint8).view(torch.int8).tolist()


def _byte_perm(low: int, high: int, selector: int) -> int:
    """CUDA's __byte_perm: byte i of the result is the byte of (low, high) that nibble i of the selector names."""
    both = high << 32 | low
    return sum((both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))


def _word(packed: Tensor, first: int) -> int:
    return int(sum(int(packed[first + i]) << 8 * i for i in range(4)))


@pytest.mark.parametrize("shift", range(7))
@pytest.mark.parametrize("g", [32, 64, 128, 256])
def test_packed_bytes_are_the_operand_that_the_wgmma_kernel_takes_them_for(g: int, shift: int) -> None:
    T = torch.randint(-1, 2, (1, g), dtype=torch.int8)
    packed = pack(T, g)[0]
    value = 64 >> shift
    values = value << 8 | (-value & 0xFF) << 24

    def permute(nibbles: int) -> tuple[int, int]:
        a, b = _byte_perm(values, 0, nibbles), _byte_perm(values, 0, nibbles >> 16)
        return _byte_perm(a, b, 0x6420), _byte_perm(a, b, 0x7531)

    for q in range(4):
        # Of each 16 columns, a thread has four from 4q.
        columns = (T[0].long() * value).view(g // 16, 4, 4)[:, q].tolist()
        if g == 32:
            word = _word(packed, q % 2 * 4) >> q // 2 * 2
            assert [_bytes(register) for register in permute(word & 0x33333333)] == columns
            continue
        words = g // 64
        for i in range(words):
            word = _word(packed, 16 * i + 4 * q)
            planes = [*permute(word & 0x33333333), *permute(word >> 2 & 0x33333333)]
            for plane, register in zip((0, 2, 1, 3), planes, strict=True):
                assert _bytes(register) == columns[plane * words + i]


def test_verify_knows_how_long_an_int32_sum_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    facts = Facts(
        device="cuda",
        capability=(9, 0),
        dtype=torch.bfloat16,
        in_features=2**17 - 128,
        out_features=(64,),
        planes=(1,),
        group_size=128,
        mantissa=False,
    )
    assert backend.verify("linear_int8", facts)[0]
    facts = dataclasses.replace(facts, in_features=2**17)
    assert backend.verify("linear", facts)[0]
    ok, reason = backend.verify("linear_int8", facts)
    assert not ok
    assert "in_features is 131072" in reason


# What is compiled.


def _compile(program: Any, folder: Path) -> tuple[str, str]:
    """CUDA source of a program, and what ptxas reports of it."""
    import tilelang
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        source = str(tilelang.lower(program, target=target).kernel_source)
    if shutil.which("nvcc") is None:
        return source, ""
    (folder / "kernel.cu").write_text(source)
    command = (
        "nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -DENABLE_BF16 -Xptxas=-v "
        f"-I{TILELANG_TEMPLATE_PATH} -I{CUTLASS_INCLUDE_DIR} --cubin kernel.cu"
    )
    result = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return source, result.stderr


@pytest.mark.parametrize(
    ("M", "N", "K", "g", "has_bias"),
    [(64, 333, 1536, 64, True), (4096, 4096, 4096, 128, False), (17, 77, 96, 32, True)],
)
def test_the_wgmma_kernel_multiplies_registers_and_compiles(
    tmp_path: Path, M: int, N: int, K: int, g: int, has_bias: bool
) -> None:
    from ternarize.backends.tilelang.linear_int8_wgmma import choose_int8_wgmma_tile, int8_wgmma_program

    tile = choose_int8_wgmma_tile(M, N, K, g)
    source, report = _compile(int8_wgmma_program(N, K, g, "bfloat16", has_bias=has_bias, tile=tile), tmp_path)
    assert "wgmma_rs<tl::DataType::kInt8, tl::DataType::kInt8, tl::DataType::kInt32" in source
    assert "tma_load(q_desc" in source
    # A few registers of the block that is seldom run may be spilled; ptxas also says where it serialises wgmma.
    assert all(int(spilled) <= 64 for spilled in re.findall(r"(\d+) bytes spill", report))
    assert "C75" not in report


# What is computed.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 16, 17, 64, 65, 257])
@pytest.mark.parametrize(("N", "K", "g"), [(333, 96, 32), (77, 576, 64), (1000, 1024, 128), (129, 512, 256)])
def test_linear_int8_equals_float64(dtype: torch.dtype, M: int, N: int, K: int, g: int) -> None:
    torch.manual_seed(0)
    layers = [random_weights(n, K, g, bias=n % 2 == 1, device="cuda") for n in (N, 64)]
    q, scale = quantize_activation(torch.randn(2, M, K, device="cuda"))
    outputs = linear_int8("tilelang", q, scale, layers, g, dtype)
    for y, layer in zip(outputs, layers, strict=True):
        assert y.dtype == dtype
        assert_close(y, linear("torch", q.double() * scale.double(), [layer], g)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [3, 16, 40, 300])
@pytest.mark.parametrize("exponents", [(-126, -126), (127, 127), (-126, 127), (-20, 10)])
def test_linear_int8_is_exact_for_every_exponent(M: int, exponents: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = random_weights(140, 2048, 128, exponents=exponents, device="cuda")
    # The least scale, so that the largest weights give what bfloat16 holds, though their sums over q leave it.
    x = torch.randn(M, 2048, device="cuda") * (1e-6 if exponents[1] == 127 else 1.0)
    q, scale = quantize_activation(x)
    (y,) = linear_int8("tilelang", q, scale, [layer], 128, torch.bfloat16)
    assert_close(y, linear("torch", q.double() * scale.double(), [layer], 128)[0])
