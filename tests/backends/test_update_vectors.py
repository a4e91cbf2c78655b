"""The kernels of an update that step no weights, where layers of other tests are too small for them."""

import pytest
import torch

from ternarize.backends.triton.update_vectors import finish_stage
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
