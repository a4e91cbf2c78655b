"""The stage by tensor descriptors. Activations and gradients are small integers: G is exact, and results are equal."""

import copy

import pytest
import torch
from torch import Tensor

from ternarize.backends.torch.update import NONFINITE_GRADIENT
from ternarize.backends.triton import update_tma, update_vectors
from ternarize.backends.triton.update_tma import TILES, Tile
from ternarize.layer import TernaryLinear
from tests.backends.test_update import integers, random_layer, stage, staged

#: Tiles that the interpreter is through with in a second.
SMALL = [
    Tile(16, 64, 16, SLICES=2, num_stages=1, num_warps=4, PANEL=2, TERAFLOPS=1.0),
    Tile(32, 128, 16, SLICES=4, num_stages=1, num_warps=4, PANEL=2, TERAFLOPS=1.0),
    Tile(16, 128, 32, SLICES=2, num_stages=1, num_warps=4, PANEL=2, TERAFLOPS=1.0),
]

on_the_cpu_or_a_gpu = pytest.mark.parametrize(
    ("device", "dtype", "tile"),
    [
        *(
            pytest.param(
                "cpu",
                torch.float32,
                tile,
                id=f"cpu-{i}",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
            )
            for i, tile in enumerate(SMALL)
        ),
        *(
            pytest.param("cuda", dtype, tile, id=f"cuda-{dtype}-{i}", marks=pytest.mark.gpu)
            for dtype in (torch.bfloat16, torch.float16)
            for i, tile in enumerate(TILES)
        ),
    ],
)


def stage_by_descriptors(layer: TernaryLinear, grad_y: Tensor, x: Tensor, tile: Tile) -> None:
    assert layer.row_log2 is not None
    assert layer.col_log2 is not None
    assert layer.stage is not None
    assert layer.stage_row is not None
    assert layer.stage_col is not None
    factors = update_vectors.normalisers(layer.row_log2, layer.col_log2)
    parts = update_tma.stage_factored(grad_y, x, *factors, layer.rng, layer.stage, layer.status, tile)
    update_vectors.finish_stage(layer.status, (layer.stage_row, layer.stage_col), parts)


def factored_layer(N: int, K: int, device: str) -> TernaryLinear:
    layer = random_layer(N, K, 32, "factored", "int8", device, train_exponents=False)
    assert layer.row_log2 is not None
    assert layer.col_log2 is not None
    # Integers of every size, also beyond the clip.
    layer.row_log2.copy_(torch.randint(-400, 2400, (N,), dtype=torch.int16))
    layer.col_log2.copy_(torch.randint(-400, 2400, (K,), dtype=torch.int16))
    return layer


@on_the_cpu_or_a_gpu
@pytest.mark.parametrize(("M", "N", "K"), [(1, 8, 8), (19, 16, 128), (7, 24, 40), (40, 56, 136), (16, 8, 264)])
def test_it_stages_what_the_reference_stages(
    device: str, dtype: torch.dtype, tile: Tile, M: int, N: int, K: int
) -> None:
    layer = factored_layer(N, K, device)
    assert layer.stage is not None
    expected = copy.deepcopy(layer)
    # What an earlier step left.
    layer.stage.fill_(99)
    for _ in range(2):
        # Rows of larger matrices, as a slice of a fused projection is.
        grad_y = integers(M, 2 * N, device=device).to(dtype)[:, N:]
        x = integers(M, 2 * K, device=device).to(dtype)[:, :K]
        stage_by_descriptors(layer, grad_y, x, tile)
        stage("torch", [expected], [grad_y], x)
        for got, wanted in zip(staged(layer), staged(expected), strict=True):
            assert torch.equal(got, wanted)
    assert expected.stage is not None
    assert expected.stage.unique().numel() > 5


@on_the_cpu_or_a_gpu
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton.*")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning:triton.*")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_it_flags_what_is_not_finite(device: str, dtype: torch.dtype, tile: Tile, value: float) -> None:
    layer = factored_layer(40, 72, device)
    grad_y, x = integers(9, 40, device=device).to(dtype), integers(9, 72, device=device).to(dtype)
    x[3, 70] = value
    stage_by_descriptors(layer, grad_y, x, tile)
    assert layer.status.tolist() == [NONFINITE_GRADIENT, 1]


@on_the_cpu_or_a_gpu
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning:triton.*")
def test_squares_beyond_float32_are_no_gradient_beyond_it(device: str, dtype: torch.dtype, tile: Tile) -> None:
    if dtype == torch.float16:
        pytest.skip("float16 holds no such number")
    layer = factored_layer(40, 72, device)
    grad_y, x = torch.zeros(9, 40, device=device, dtype=dtype), torch.zeros(9, 72, device=device, dtype=dtype)
    grad_y[0, 33], x[0, 70] = 2.0**60, 2.0**60
    stage_by_descriptors(layer, grad_y, x, tile)
    assert layer.status.tolist() == [0, 1]


@pytest.mark.gpu
def test_the_op_takes_it_and_gives_the_same_sums_every_time() -> None:
    torch.manual_seed(0)
    layer = factored_layer(1000, 808, "cuda")
    grad_y = torch.randn(777, 1000, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(777, 808, device="cuda", dtype=torch.bfloat16)
    assert update_tma.takes(grad_y, x)
    other = copy.deepcopy(layer)
    stage("triton", [layer], [grad_y], x)
    stage("triton", [other], [grad_y], x)
    for got, again in zip(staged(layer), staged(other), strict=True):
        assert torch.equal(got, again)


@pytest.mark.gpu
def test_it_refuses_what_a_descriptor_cannot_hold() -> None:
    def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, device="cuda", dtype=dtype)

    assert update_tma.takes(rows(4, 16), rows(4, 24))
    assert not update_tma.takes(rows(0, 16), rows(0, 24))
    assert not update_tma.takes(rows(4, 15), rows(4, 24))
    assert not update_tma.takes(rows(4, 16), rows(4, 28))
    assert not update_tma.takes(rows(4, 16), rows(24, 4).t())
    assert not update_tma.takes(rows(4, 16), rows(4, 32)[:, 4:28])
    assert not update_tma.takes(rows(4, 16, dtype=torch.float32), rows(4, 24, dtype=torch.float32))


@pytest.mark.parametrize(
    ("N", "K", "tile"),
    [(64, 64, 2), (768, 768, 2), (512, 2048, 2), (2048, 768, 1), (768, 2048, 1), (2048, 2048, 0), (14336, 4096, 0)],
)
def test_the_tile_of_a_layer_is_the_one_that_was_fastest(N: int, K: int, tile: int) -> None:
    assert update_tma.tile_of(N, K, 132) == TILES[tile]
