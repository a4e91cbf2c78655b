"""The program around linear_wgmma.cuh, without a GPU: its arguments, what it compiles to, its tiles."""

import re
from pathlib import Path
from typing import Any

import pytest

from ternarize.config import Activation
from tests.backends.hopper_kit import Case, Dtype, assert_compiles, layer_shape, lower

pytest.importorskip("tilelang", reason="TileLang is for Linux")

#: Those with the most registers, and with every argument that there is; with as many stages as fit.
PROGRAMS = {
    "tokens of x at most": Case(M=256, layers=(layer_shape(4096),), K=4096, g=128, tile={"BLOCK_M": 256, "CLUSTER": 1}),
    "three layers": Case(
        M=64,
        layers=(layer_shape(4096), layer_shape(1024, bias=True), layer_shape(333)),
        K=4096,
        g=128,
        tile={"BLOCK_M": 64, "ROW_TILES": 1, "WARPGROUPS": 4, "CLUSTER": 2},
    ),
    "three planes with mantissas": Case(
        M=64,
        layers=(layer_shape(333, planes=3, mantissa="int16", bias=True),),
        K=1152,
        g=64,
        tile={"BLOCK_M": 64, "ROW_TILES": 2, "CLUSTER": 4},
    ),
    "float16, groups of 32": Case(
        M=64,
        layers=(layer_shape(336, bias=True),),
        K=1152,
        g=32,
        dtype="float16",
        tile={"BLOCK_M": 64, "ROW_TILES": 1, "WARPGROUPS": 3, "CLUSTER": 8},
    ),
    "208 tokens, split over two": Case(
        M=208, layers=(layer_shape(4096),), K=4096, g=128, tile={"BLOCK_M": 208, "CLUSTER": 2}
    ),
    "float16, 96 tokens": Case(
        M=96,
        layers=(layer_shape(336, bias=True),),
        K=1152,
        g=32,
        dtype="float16",
        tile={"BLOCK_M": 96, "WARPGROUPS": 2, "CLUSTER": 8},
    ),
    "int8, tokens of x at most": Case(
        M=256,
        layers=(layer_shape(4096),),
        K=4096,
        g=128,
        activation="int8",
        tile={"BLOCK_M": 256, "CLUSTER": 2},
    ),
    "int8, three layers": Case(
        M=128,
        layers=(layer_shape(4096), layer_shape(1024, bias=True), layer_shape(333)),
        K=4096,
        g=128,
        activation="int8",
        tile={"BLOCK_M": 128, "ROW_TILES": 2, "CLUSTER": 2},
    ),
    "int8, groups of 32": Case(
        M=64,
        layers=(layer_shape(336, bias=True),),
        K=1152,
        g=32,
        dtype="float16",
        activation="int8",
        tile={"BLOCK_M": 64, "ROW_TILES": 1, "WARPGROUPS": 4, "CLUSTER": 8},
    ),
    "int8, groups of 64": Case(
        M=64,
        layers=(layer_shape(333, bias=True),),
        K=1216,
        g=64,
        activation="int8",
        tile={"BLOCK_M": 128, "ROW_TILES": 2, "CLUSTER": 4},
    ),
}


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_passes_its_arguments_in_order(name: str, guarded: bool) -> None:
    case = PROGRAMS[name]
    source = _lower(case, guarded=guarded)
    call = source[source.rindex("ternarize::linear_wgmma<") :].split(";")[0]
    expected = ["x_desc", "M", "shared", "scale" if case.activation == "int8" else "0"]
    for i, layer in enumerate(case.layers):
        expected += [f"T_packed_{i}_desc", f"y_{i}_desc" if layer.N % 8 == 0 else "0", str(layer.N), f"E_{i}"]
        expected += [f"E_mantissa_{i}" if layer.mantissa else "0"]
        expected += [f"bias_{i}", f"bias_exponent_{i}"] if layer.bias else ["0", "0"]
        expected += [f"status_{i}" if guarded else "0", f"y_{i}"]
    given = re.sub(r"ternarize::layer|\(&\((\w+)\[0\]\)\)", r"\1", call[call.index(">(") + 2 :])
    assert re.findall(r"\w+", given) == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_compiles(tmp_path: Path, name: str) -> None:
    case = PROGRAMS[name]
    source = _lower(case, guarded=True)
    # Swizzled boxes start where the pattern does.
    assert "extern __shared__ __align__(1024)" in source
    # Without a wait that TileLang sees, it does not launch the kernel as dependent.
    assert "cudaGridDependencySynchronize" in source
    assert_compiles(source, tmp_path)


def _lower(case: Case, *, guarded: bool) -> str:
    from ternarize.backends.tilelang.linear_wgmma import wgmma_program, wgmma_tiles

    tiles = wgmma_tiles(case.layers, case.dtype, case.activation)
    (tile,) = (tile for tile in tiles if case.tile.items() <= vars(tile).items())
    call = (case.layers, case.K, case.g, case.dtype)
    return lower(wgmma_program(*call, guarded=guarded, tile=tile, activation=case.activation))


@pytest.mark.parametrize(
    ("layer", "dtype", "activation"),
    [
        (layer_shape(64), "bfloat16", "float"),
        (layer_shape(64), "float16", "float"),
        (layer_shape(64, mantissa="int16"), "bfloat16", "float"),
        (layer_shape(64, planes=3), "bfloat16", "float"),
        (layer_shape(64, planes=3), "float16", "float"),
        (layer_shape(64), "bfloat16", "int8"),
    ],
)
def test_every_tile_fits(layer: Any, dtype: Dtype, activation: Activation) -> None:
    from ternarize.backends.tilelang.linear_wgmma import wgmma_tiles

    tiles = list(wgmma_tiles((layer,), dtype, activation))
    assert {tile.CLUSTER for tile in tiles} == {1, 2, 4, 8}
    for tile in tiles:
        assert tile.shared_bytes(layer.planes, activation) <= 227 * 1024
        # Units of 8 tokens and 64 outputs of a warpgroup, which the blocks of a cluster share when they split a tile.
        units = tile.ROW_TILES * tile.BLOCK_M // 8
        assert units % tile.own_units == 0
        assert units <= tile.own_units * tile.CLUSTER
        parts_bytes = tile.CLUSTER * tile.own_units * 128 * tile.WARPGROUPS * 16
        assert parts_bytes <= tile.STAGES * (tile.stage_bytes(layer.planes, activation) - 16)
        # What a warpgroup stores at once is of one row tile.
        assert tile.BLOCK_M % tile.stored_tokens == 0


@pytest.mark.parametrize(
    ("layers", "K", "g", "dtype", "activation"),
    [
        ((layer_shape(4096),), 4096, 128, "bfloat16", "float"),
        ((layer_shape(4096), layer_shape(1024), layer_shape(1024)), 4096, 128, "float16", "float"),
        ((layer_shape(8192, bias=True),), 28672, 128, "bfloat16", "float"),
        ((layer_shape(1),), 64, 64, "bfloat16", "float"),
        ((layer_shape(333, planes=3, mantissa="int32"),), 1152, 32, "bfloat16", "float"),
        ((layer_shape(1000, planes=2),), 8960, 8960, "float16", "float"),
        ((layer_shape(4096), layer_shape(1024), layer_shape(1024)), 4096, 128, "bfloat16", "int8"),
        ((layer_shape(1),), 64, 64, "float16", "int8"),
    ],
)
def test_a_tile_is_chosen_for_every_number_of_tokens(
    layers: tuple[Any, ...], K: int, g: int, dtype: Dtype, activation: Activation
) -> None:
    from ternarize.backends.tilelang.linear_wgmma import choose_wgmma_tile, wgmma_tiles

    tiles = set(wgmma_tiles(layers, dtype, activation))
    tokens = (*range(1, 300), *range(300, 9001, 100))
    assert tiles.issuperset(choose_wgmma_tile(M, layers, K, g, dtype, activation) for M in tokens)


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_tiles_grow_with_the_tokens(activation: Activation) -> None:
    from ternarize.backends.tilelang.linear_wgmma import choose_wgmma_tile

    layers = (layer_shape(4096),)
    few, many = (choose_wgmma_tile(M, layers, 4096, 128, "bfloat16", activation) for M in (16, 4096))
    # Little work is split along K, and much is not.
    assert few.BLOCK_M <= 32
    assert few.CLUSTER > 1
    assert many.BLOCK_M * many.BLOCK_N >= 128 * 128


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("M", [32, 96, 160])
def test_tokens_between_powers_of_two_have_tiles_of_their_own(M: int, activation: Activation) -> None:
    from ternarize.backends.tilelang.linear_wgmma import choose_wgmma_tile

    assert choose_wgmma_tile(M, (layer_shape(28672),), 8192, 128, "bfloat16", activation).BLOCK_M == M


def test_few_tokens_decode() -> None:
    from ternarize.backends.tilelang.linear import choose_tile
    from ternarize.backends.tilelang.linear_decode import DecodeTile

    # More where the rows are short, or many.
    for N, K, few in ((64, 4096, 16), (4096, 14336, 16), (4095, 14336, 8)):
        layers = (layer_shape(N),)
        assert isinstance(choose_tile(few, layers, K, 128, "float16"), DecodeTile)
        assert not isinstance(choose_tile(few + 1, layers, K, 128, "float16"), DecodeTile)
