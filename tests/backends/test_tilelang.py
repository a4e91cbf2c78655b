import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ternarize.backends import tilelang as backend
from ternarize.backends.select import Facts
from ternarize.packing import ROW, dequantize, exp2_exact, groups_per_row, pack, unpack

pytest.importorskip("tilelang", reason="TileLang is for Linux")

Dtype = Literal["bfloat16", "float16"]

RELATIVE_ERROR = {torch.bfloat16: 2e-3, torch.float16: 5e-4}

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
    assert backend.verify("grad_input", FACTS) == (False, "there is no TileLang kernel for grad_input, only for linear")


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
    from ternarize.backends.tilelang import linear_kernel

    return linear_kernel


def _number(register: Tensor) -> Tensor:
    """The two bfloat16 of each int64 that holds 32 bits, as [..., 2] float32: the low half first."""
    halves = torch.stack([register & 0xFFFF, register >> 16 & 0xFFFF], -1)
    return (halves << 16).to(torch.int32).view(torch.float32)


def _random_group(g: int) -> tuple[Tensor, Tensor]:
    """A row of one group: its packed bytes as int64 [g / 4], and twice its trits as float32 [g]."""
    packed = pack(torch.randint(-1, 2, (1, g), dtype=torch.int8), g)
    return packed[0].long(), 2.0 * unpack(packed, g, g)[0]


def test_packed_bytes_are_the_fragments_that_the_decode_kernel_takes_them_for() -> None:
    packed, twice = _random_group(128)
    places = torch.arange(4)
    for quad_lane in range(4):
        first = 8 * quad_lane
        words = [int((packed[first + i : first + i + 4] << 8 * places).sum()) for i in (0, 4)]
        for plane in range(4):
            for b in range(2):
                for i, word in enumerate(words):
                    register = torch.tensor((word << (14 - 8 * b - 2 * plane)) & 0xC000C000)
                    byte = first + 4 * i + b
                    assert _number(register).tolist() == [twice[32 * plane + byte], twice[32 * plane + byte + 2]]


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
    from ternarize.backends.tilelang.linear import TILES

    sizes = dataclasses.replace(TILES[tile], split=split)
    source = _lower(kernel_module.linear_program(N, K, g, dtype, has_bias=has_bias, tile=sizes))
    assert "wgmma_rs<" in source
    assert "tma_load(x_desc" in source
    assert ("tma_load(T_packed_desc" in source) == packed_by_tma
    assert ("bias_exponent" in source) == has_bias
    assert (f"cluster_sum<{split}>(" in source) == (split > 1)
    _assert_compiles(source, tmp_path)


@pytest.mark.parametrize(("M", "N", "K", "has_bias"), [(1, 4096, 4096, False), (16, 333, 1152, True)])
def test_the_decode_kernel_gets_its_arguments_in_order_and_compiles(
    kernel_module: Any, tmp_path: Path, M: int, N: int, K: int, has_bias: bool
) -> None:
    from ternarize.backends.tilelang.linear import choose_decode_tile
    from ternarize.backends.tilelang.linear_decode import decode_program

    tile = choose_decode_tile(M, N, K)
    assert tile is not None
    source = _lower(decode_program(N, K, has_bias=has_bias, tile=tile))
    call = source[source.rindex("ternarize::linear_decode<") :].split(";")[0]
    pointers = [name.strip("&()") for name in re.findall(r"&\(\w+", call)]
    assert pointers == ["x", "T_packed", "E", "y", "shared"] + ["bias", "bias_exponent"] * has_bias
    assert f"__launch_bounds__({32 * tile.WARPS}, {tile.blocks_per_multiprocessor})" in source
    assert "cudaGridDependencySynchronize" in source
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


def test_the_tile_grows_with_the_work() -> None:
    from ternarize.backends.tilelang.linear import TILES, choose_tile

    narrow, middle, middle_wide, wide, widest = TILES
    assert choose_tile(16, 28672, 4096, 128, "float16") == narrow
    assert choose_tile(64, 4096, 4096, 128, "bfloat16") == dataclasses.replace(middle, split=2)
    assert choose_tile(64, 28672, 4096, 128, "bfloat16") == middle_wide
    assert choose_tile(300, 14336, 4096, 128, "bfloat16") == widest
    # No room for the sums of 256 tokens twice, or for stages of 256 x 256.
    assert choose_tile(8192, 4096, 4096, 128, "float16") == wide
    assert choose_tile(8192, 4096, 4096, 256, "bfloat16") == wide


def test_k_is_split_when_the_blocks_are_too_few() -> None:
    from ternarize.backends.tilelang.linear import choose_tile
    from ternarize.backends.tilelang.linear_kernel import Tile

    for N, K, split in ((4096, 4096, 2), (8192, 28672, 2), (14336, 4096, 1), (4096, 2048, 1), (1024, 14336, 4)):
        tile = choose_tile(64, N, K, 128, "bfloat16")
        assert isinstance(tile, Tile)
        assert tile.split == split


def test_few_tokens_decode() -> None:
    from ternarize.backends.tilelang.linear import choose_decode_tile, choose_tile
    from ternarize.backends.tilelang.linear_decode import DecodeTile

    assert isinstance(choose_tile(16, 4096, 4096, 128, "bfloat16"), DecodeTile)
    for M, dtype, g in ((17, "bfloat16", 128), (1, "float16", 128), (1, "bfloat16", 64)):
        assert not isinstance(choose_tile(M, 4096, 4096, g, dtype), DecodeTile)  # type: ignore[arg-type]
    # Fewer rows than a row block, and an x that does not fit the shared memory of a cluster.
    assert choose_decode_tile(1, 8, 4096) is None
    assert choose_decode_tile(16, 4096, 2**16) is None


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 4096, 4096), (16, 4096, 4096), (8, 8192, 28672), (1, 333, 128), (9, 1000, 1152), (16, 1536, 8960)],
)
def test_a_decode_tile_shares_out_all_work_and_fits(M: int, N: int, K: int) -> None:
    from ternarize.backends.tilelang.linear import choose_decode_tile

    tile = choose_decode_tile(M, N, K)
    assert tile is not None
    assert M <= tile.TOKENS
    # No block, and no warp that K is split over, is without work.
    steps, rest = divmod(K // 128, tile.STEP)
    assert rest == 0
    assert steps >= tile.CLUSTER * tile.K_WARPS
    assert tile.row_blocks(N) >= tile.CLUSTERS
    assert tile.WARPS % tile.K_WARPS == 0
    assert tile.blocks_per_multiprocessor * (tile.shared_bytes(N, K) + 1024) <= 228 * 1024


# What it computes, on a Hopper GPU.


@dataclasses.dataclass
class Layer:
    T_packed: Tensor
    E: Tensor
    bias: Tensor | None
    bias_exponent: Tensor | None
    K: int
    g: int

    @classmethod
    def random(cls, N: int, K: int, g: int, *, E: Tensor | None = None, bias_exponent: int | None = None) -> "Layer":
        """A layer on the GPU with E about -5, or as given: int [G] or [N, G]."""
        G = groups_per_row(K, g)
        T = torch.randint(-1, 2, (N, K), dtype=torch.int8)
        E = torch.randint(-8, -2, (N, G)) if E is None else E.expand(N, G)
        bias = None if bias_exponent is None else torch.randint(-(2**31), 2**31, (N,)).int().cuda()
        exponent = None if bias_exponent is None else torch.tensor([bias_exponent], dtype=torch.int8, device="cuda")
        return cls(pack(T, g).cuda(), E.to(torch.int8).contiguous().cuda(), bias, exponent, K, g)

    def expected(self, x: Tensor) -> Tensor:
        """float64 [..., N]."""
        y = x.double() @ dequantize(self.T_packed, self.E, None, self.K, self.g, torch.float64).mT
        if self.bias is None or self.bias_exponent is None:
            return y
        return y + torch.ldexp(self.bias.double(), self.bias_exponent)


def _run(x: Tensor, *layers: Layer) -> list[Tensor]:
    outputs: list[Tensor] = torch.ops.ternarize.linear_tilelang(
        x,
        [layer.T_packed for layer in layers],
        [layer.E for layer in layers],
        [None for _ in layers],
        [layer.bias for layer in layers],
        [layer.bias_exponent for layer in layers],
        layers[0].g,
    )
    return outputs


def _assert_right(y: Tensor, x: Tensor, layer: Layer) -> None:
    expected = layer.expected(x)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    error = (y.double() - expected).norm() / expected.norm()
    assert error < RELATIVE_ERROR[x.dtype], f"relative error {error:.1e}"


def _x(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.gpu
@both_dtypes
@pytest.mark.parametrize("M", [1, 3, 16, 17, 64, 65, 257])
@pytest.mark.parametrize(
    ("N", "K", "g"),
    [(333, 96, 32), (77, 576, 64), (1000, 1024, 128), (129, 512, 256), (64, 128, ROW)],
)
def test_linear_equals_float64(dtype: torch.dtype, M: int, N: int, K: int, g: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(N, K, g, bias_exponent=-31 if N % 2 else None)
    x = _x(M, K, dtype=dtype)
    _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.gpu
@both_dtypes
@pytest.mark.parametrize("g", [32, 64, 128, 256])
def test_linear_equals_float64_in_the_widest_tile(dtype: torch.dtype, g: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(2047, 2048, g, bias_exponent=-30)
    x = _x(1100, 2048, dtype=dtype)
    _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.gpu
@both_dtypes
@pytest.mark.parametrize("M", [2, 40])
def test_linear_holds_over_the_whole_range_of_exponents(dtype: torch.dtype, M: int) -> None:
    torch.manual_seed(0)
    K, g, N = 2048, 64, 130
    # x is scaled the other way, so every group weighs the same in y; x of float16 is normal down to 2^-14.
    ends = (-126, 127) if dtype == torch.bfloat16 else (-12, 12)
    E = torch.linspace(*ends, K // g).round().int()
    x = torch.randn(M, K, device="cuda") * exp2_exact(-E.clamp(-124, 124)).cuda().repeat_interleave(g)
    layer = Layer.random(N, K, g, E=(E + torch.randint(-1, 2, (N, K // g))).clamp(*ends))
    _assert_right(_run(x.to(dtype), layer)[0], x.to(dtype), layer)


@pytest.mark.gpu
def test_float16_neither_clamps_nor_overflows_exponents() -> None:
    torch.manual_seed(0)
    K, g = 512, 128
    # Clamped to what float16 holds, 2^-126 would be 2^-14 and its group, of large x, a tenth of y.
    layer = Layer.random(130, K, g, E=torch.tensor([-126, 0, 127, 20]))
    x = _x(5, K, dtype=torch.float16) * torch.tensor([2000.0, 1, 0, 2**-20], device="cuda").repeat_interleave(g).half()
    _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.gpu
@pytest.mark.parametrize(("E", "bias_exponent"), [(-126, -128), (90, 60), (-5, -40)])
def test_bias_takes_any_exponent(E: int, bias_exponent: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(200, 256, 128, E=torch.tensor([E]), bias_exponent=bias_exponent)
    # About as large as the bias, 2^30 · 2^bias_exponent.
    x = (_x(9, 256, dtype=torch.float32) * 2.0 ** (bias_exponent + 27 - E)).bfloat16()
    _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.gpu
@both_dtypes
def test_linear_takes_any_leading_dimensions_strides_and_alignment(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    K = 128
    layer = Layer.random(96, K, 64)
    for x in (
        _x(K, dtype=dtype),
        _x(2, 3, 5, K, dtype=dtype),
        _x(4, 7, 2 * K, dtype=dtype)[..., ::2],
        _x(K, 30, dtype=dtype).mT,
        # Contiguous, and 2 bytes off the 16 that TMA needs.
        _x(6 * K + 1, dtype=dtype)[1:].view(6, K),
    ):
        _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 5, 8, 9, 16])
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (64, 128), (333, 1152), (1000, 14336), (8192, 1536)])
def test_decoding_equals_float64_and_itself(M: int, N: int, K: int) -> None:
    torch.manual_seed(0)
    layer = Layer.random(N, K, 128, bias_exponent=-31 if N % 2 else None)
    x = _x(M, K, dtype=torch.bfloat16)
    y = _run(x, layer)[0]
    _assert_right(y, x, layer)
    # The parts of K are summed in one order, whichever warp is first.
    assert all(torch.equal(_run(x, layer)[0], y) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [2, 40, 300])
def test_groups_of_128_hold_over_the_whole_range_of_exponents(M: int) -> None:
    torch.manual_seed(0)
    K, g, N = 4096, 128, 130
    E = torch.linspace(-126, 127, K // g).round().int()
    # Up to 2^115: the decode kernel sums twice a group of x before it scales the sum.
    x = torch.randn(M, K, device="cuda") * exp2_exact(-E.clamp(-115, 124)).cuda().repeat_interleave(g)
    layer = Layer.random(N, K, g, E=(E + torch.randint(-1, 2, (N, K // g))).clamp(-126, 127))
    _assert_right(_run(x.bfloat16(), layer)[0], x.bfloat16(), layer)


@pytest.mark.gpu
@both_dtypes
@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("M", [13, 64, 130])
def test_split_k_equals_float64(dtype: torch.dtype, split: int, M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ternarize.backends.tilelang import linear as module

    def split_tile(*_: object) -> Any:
        return dataclasses.replace(module.TILES[1 if M <= 64 else 2], split=split)

    monkeypatch.setattr(module, "choose_tile", split_tile)
    torch.manual_seed(0)
    layer = Layer.random(333, 2048, 128, bias_exponent=-31)
    x = _x(M, 2048, dtype=dtype)
    _assert_right(_run(x, layer)[0], x, layer)


@pytest.mark.gpu
def test_no_tokens_give_an_empty_result() -> None:
    y = _run(torch.empty(2, 0, 128, device="cuda", dtype=torch.bfloat16), Layer.random(96, 128, 64))[0]
    assert y.shape == (2, 0, 96)


@pytest.mark.gpu
def test_layers_that_share_their_input_each_get_their_own_result() -> None:
    torch.manual_seed(0)
    layers = [Layer.random(N, 256, 128, bias_exponent=e) for N, e in ((256, None), (64, -31), (65, -31))]
    x = _x(33, 256, dtype=torch.bfloat16)
    for y, layer in zip(_run(x, *layers), layers, strict=True):
        _assert_right(y, x, layer)


@pytest.mark.gpu
def test_linear_runs_in_a_cuda_graph() -> None:
    torch.manual_seed(0)
    layer = Layer.random(256, 256, 128)
    x = _x(8, 256, dtype=torch.bfloat16)
    _run(x, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _run(x, layer)[0]
    x.copy_(_x(8, 256, dtype=torch.bfloat16))
    graph.replay()
    _assert_right(y, x, layer)
