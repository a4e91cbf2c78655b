"""The kernels of an update that step no weights, where layers of other tests are too small for them."""

import pytest
import torch

from ternarize.backends.torch import update as reference
from ternarize.backends.triton.update_vectors import finish_stage, normalisers
from tests.backends.kit import DEVICES, skip_unless_triton_runs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("row_tiles", "col_tiles"), [(1, 300), (128, 129), (256, 5)])
def test_the_parts_of_all_tiles_are_added(device: str, row_tiles: int, col_tiles: int) -> None:
    skip_unless_triton_runs(device)
    torch.manual_seed(0)
    status = torch.tensor([4, 2], dtype=torch.int32, device=device)
    sums = (torch.full((70,), 3.0, device=device), torch.full((130,), 5.0, device=device))
    parts = tuple(
        torch.randint(0, 100, (tiles, total.numel())).float().to(device)
        for tiles, total in zip((row_tiles, col_tiles), sums, strict=True)
    )
    expected = [total + part.sum(0) for total, part in zip(sums, parts, strict=True)]
    finish_stage(status, sums, (parts[0], parts[1]))
    for total, wanted in zip(sums, expected, strict=True):
        assert torch.equal(total, wanted)
    assert status.tolist() == [4, 3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("N", "K"), [(1, 3), (130, 700), (700, 1), (20000, 5)])
def test_normalisers_take_the_mean_over_all_rows(device: str, N: int, K: int) -> None:
    skip_unless_triton_runs(device)
    torch.manual_seed(0)
    row_log2, col_log2 = (torch.randint(-3000, 3000, (n,), dtype=torch.int16, device=device) for n in (N, K))
    # The rows that count most are the last.
    row_log2[-1] = 4000
    for got, wanted in zip(normalisers(row_log2, col_log2), reference.normalisers(row_log2, col_log2), strict=True):
        # Sums of float64 in another order: a last bit of float32 may differ.
        torch.testing.assert_close(got, wanted, rtol=2e-7, atol=0)
