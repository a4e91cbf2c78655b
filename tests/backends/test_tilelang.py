"""The TileLang kernels without a GPU: what the verifier says, what is compiled, how the work is shared out."""

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ternarize.backends import tilelang as backend
from ternarize.backends.select import Facts
from ternarize.packing import ROW, exp2_exact, pack, unpack

pytest.importorskip("tilelang", reason="TileLang is for Linux")

Dtype = Literal["bfloat16", "float16"]

FACTS = Facts(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    in_features=4096,
    out_features=(4096, 333),
    planes=(1, 1),
    group_size=128,
    mantissa=False,
)


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA_HOME with an nvcc in it, whatever the machine has."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return compiler


# What the verifier accepts and says.


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": torch.float16},
        {"group_size": 32, "in_features": 96},
        {"group_size": 64, "in_features": 576},
        {"group_size": 256},
        {"group_size": ROW, "in_features": 128},
    ],
)
def test_verify_accepts_what_the_kernel_runs(nvcc: Path, change: dict[str, Any]) -> None:
    ok, reason = backend.verify("linear", dataclasses.replace(FACTS, **change))
    assert ok, reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu", "capability": (0, 0)}, "the tensors are on cpu, need cuda"),
        ({"capability": (8, 6)}, "the GPU has compute capability 8.6, need 9.0 (Hopper)"),
        ({"capability": (10, 0)}, "the GPU has compute capability 10.0, need 9.0 (Hopper)"),
        ({"dtype": torch.float32}, "the activations are torch.float32, need torch.bfloat16 or torch.float16"),
        ({"planes": (1, 3)}, "a layer has 3 trit planes, it handles one trit plane"),
        ({"mantissa": True}, "a layer has scales with a mantissa, need powers of two"),
        ({"group_size": 96}, "group_size is 96 at in_features 4096, need one of 32, 64, 128, 256"),
        ({"group_size": ROW}, "group_size is -1 at in_features 4096, need one of 32, 64, 128, 256"),
        ({"in_features": 576}, "in_features 576 is not a multiple of group_size 128"),
    ],
)
def test_verify_says_what_it_got_and_what_it_needs(nvcc: Path, change: dict[str, Any], reason: str) -> None:
    assert backend.verify("linear", dataclasses.replace(FACTS, **change)) == (False, reason)


def test_verify_refuses_other_ops(nvcc: Path) -> None:
    assert backend.verify("grad_input", FACTS) == (
        False,
        "there is no TileLang kernel for grad_input, only for linear and linear_int8",
    )


def test_verify_refuses_without_tilelang(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.verify("linear", FACTS) == (False, "the package tilelang is not installed")


def test_verify_refuses_without_nvcc(nvcc: Path) -> None:
    nvcc.unlink()
    ok, reason = backend.verify("linear", FACTS)
    assert not ok
    assert "nvcc" in reason


# What is compiled.


@pytest.fixture(scope="module")
def kernel_module() -> Any:
    """Imported late: TileLang takes a second to import."""
    from ternarize.backends.tilelang import linear_wgmma

    return linear_wgmma


def _number(register: Tensor) -> Tensor:
    """The two bfloat16 of each int64 that holds 32 bits, as [..., 2] float32: the low half first."""
    halves = torch.stack([register & 0xFFFF, register >> 16 & 0xFFFF], -1)
    return (halves << 16).to(torch.int32).view(torch.float32)


def _random_group(g: int) -> tuple[Tensor, Tensor]:
    """A row of one group: its packed bytes as int64 [g / 4], and twice its trits as float32 [g]."""
    packed = pack(torch.randint(-1, 2, (1, g), dtype=torch.int8), g)
    return packed[0].long(), 2.0 * unpack(packed, g, g)[0]


@pytest.mark.parametrize("g", [32, 64, 128, 256])
def test_packed_bytes_are_the_operand_that_the_wgmma_kernel_takes_them_for(g: int) -> None:
    packed, twice = _random_group(g)
    # Of the 16 columns of a wgmma, a thread has the pairs from 2q and 2q + 8.
    for q in range(4):
        expected = twice.view(g // 16, 2, 4, 2)[:, :, q].reshape(-1, 2)
        pairs = packed.view(-1, 8)[:, 2 * q : 2 * q + 2]
        if g == 32:
            word = pairs[0, 0] << 8 | pairs[0, 1] << 24
            registers = torch.stack([word << (6 - 2 * plane) for plane in range(4)])
        else:
            low, high = pairs[0::2], pairs[1::2]
            word = high[:, 0] | low[:, 0] << 8 | high[:, 1] << 16 | low[:, 1] << 24
            planes = [torch.stack([word << (6 - 2 * plane), word << (14 - 2 * plane)], -1) for plane in range(4)]
            registers = torch.stack(planes)
        assert torch.equal(_number(registers.flatten() & 0xC000C000), expected)


@pytest.mark.parametrize("E", [-126, -125, -1, 0, 127])
def test_the_scale_takes_back_the_two_of_the_decoded_trit(E: int) -> None:
    # The exponent field of 2^(E - 1), or at the lower end the subnormal 2^-127.
    bits = max((E + 126) << 7, 0x40)
    assert 2 * torch.tensor(bits, dtype=torch.uint16).view(torch.bfloat16).float() == exp2_exact(torch.tensor(E))


#: N, K, g, dtype, has_bias, tile, blocks that split K, whether the packed trits come by TMA.
PROGRAMS: list[tuple[int, int, int, Dtype, bool, int, int, bool]] = [
    (4096, 4096, 128, "bfloat16", True, 3, 1, True),
    (4096, 4096, 256, "float16", False, 2, 1, True),
    (333, 1536, 64, "bfloat16", False, 1, 4, True),
    # Rows of 24 bytes, which TMA cannot read.
    (77, 96, 32, "float16", True, 0, 1, False),
]


def _lower(program: Any) -> str:
    import tilelang

    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        return str(tilelang.lower(program, target=target).kernel_source)


@pytest.mark.parametrize(("N", "K", "g", "dtype", "has_bias", "tile", "split", "packed_by_tma"), PROGRAMS)
def test_the_kernel_decodes_into_the_registers_of_wgmma_and_compiles(
    kernel_module: Any,
    tmp_path: Path,
    N: int,
    K: int,
    g: int,
    dtype: Dtype,
    has_bias: bool,
    tile: int,
    split: int,
    packed_by_tma: bool,
) -> None:
    from ternarize.backends.tilelang.linear_wgmma import TILES

    sizes = dataclasses.replace(TILES[tile], split=split)
    source = _lower(kernel_module.wgmma_program(_layers(N, bias=has_bias), K, g, dtype, guarded=False, tile=sizes))
    assert "wgmma_rs<" in source
    assert "tma_load(x_desc" in source
    assert ("tma_load(T_packed_desc" in source) == packed_by_tma
    assert ("bias_exponent" in source) == has_bias
    assert (f"cluster_sum<{split}>(" in source) == (split > 1)
    _assert_compiles(source, tmp_path)


def _assert_compiles(source: str, folder: Path) -> None:
    """Without spills, and without a complaint of ptxas."""
    if shutil.which("nvcc") is None:
        pytest.skip("lowered; no nvcc on PATH to compile it with")
    report = _compile(source, folder)
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    # ptxas says so when it has to wait after every wgmma (C7510, C7511) or ignores setmaxnreg (C7508).
    assert "C75" not in report


def _compile(source: str, folder: Path) -> str:
    """Compile for Hopper as TileLang does, and return what ptxas reports."""
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    (folder / "kernel.cu").write_text(source)
    command = (
        "nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -DENABLE_BF16 -Xptxas=-v "
        f"-I{TILELANG_TEMPLATE_PATH} -I{CUTLASS_INCLUDE_DIR} --cubin kernel.cu"
    )
    result = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def _layers(*out_features: int, bias: bool = False) -> tuple[Any, ...]:
    from ternarize.backends.tilelang.layers import LayerShape

    return tuple(LayerShape(N=N, planes=1, mantissa=None, bias=bias) for N in out_features)


def test_the_tile_grows_with_the_work() -> None:
    from ternarize.backends.tilelang.linear import choose_tile
    from ternarize.backends.tilelang.linear_wgmma import TILES

    narrow, middle, middle_wide, wide, widest = TILES
    assert choose_tile(16, _layers(28672), 4096, 32, "float16") == narrow
    assert choose_tile(64, _layers(4096), 4096, 128, "bfloat16") == dataclasses.replace(middle, split=2)
    assert choose_tile(64, _layers(28672), 4096, 128, "bfloat16") == middle_wide
    assert choose_tile(300, _layers(14336), 4096, 128, "bfloat16") == widest
    # No room for the sums of 256 tokens twice, or for stages of 256 x 256.
    assert choose_tile(8192, _layers(4096), 4096, 128, "float16") == wide
    assert choose_tile(8192, _layers(4096), 4096, 256, "bfloat16") == wide


def test_k_is_split_when_the_blocks_are_too_few() -> None:
    from ternarize.backends.tilelang.linear import choose_tile
    from ternarize.backends.tilelang.linear_wgmma import Tile

    for N, K, split in ((4096, 4096, 2), (8192, 28672, 2), (14336, 4096, 1), (4096, 2048, 1), (1024, 14336, 4)):
        tile = choose_tile(64, _layers(N), K, 128, "bfloat16")
        assert isinstance(tile, Tile)
        assert tile.split == split


def test_few_tokens_decode() -> None:
    from ternarize.backends.tilelang.linear import choose_tile
    from ternarize.backends.tilelang.linear_decode import DecodeTile

    assert isinstance(choose_tile(16, _layers(4096), 4096, 128, "float16"), DecodeTile)
    assert not isinstance(choose_tile(17, _layers(4096), 4096, 128, "float16"), DecodeTile)
