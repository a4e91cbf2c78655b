"""Data parallel training over NCCL; needs two GPUs."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from ternarize import TernaryOptimizer
from ternarize.errors import NonFiniteError
from ternarize.layer import Apply
from tests.distributed_kit import LIMIT, OPTIONS, RANKS, STEPS, batch, loss_of, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} GPUs"),
]

MODES = [mode for mode in get_args(Apply) if mode != "backward"]


def run_rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=LIMIT)
    results: dict[str, Any] = {}
    for mode in MODES:
        model = make_model().cuda()
        optimizer = TernaryOptimizer(model, apply=mode, **OPTIONS)
        for step in range(STEPS):
            loss_of(model, batch(step, rank).cuda()).backward()
            optimizer.step()
        before = copy.deepcopy(model.state_dict())
        (loss_of(model, batch(0, rank).cuda()) * (torch.nan if rank else 1.0)).backward()
        message = ""
        try:
            optimizer.step()
        except NonFiniteError as error:
            message = str(error)
        results[mode] = (before, copy.deepcopy(model.state_dict()), message)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_replicas_stay_equal_and_refuse_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]  # of torch
        run_rank, (str(tmp_path),), nprocs=RANKS
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu", weights_only=True) for rank in range(RANKS)]
    for mode in MODES:
        before, after, message = ranks[0][mode]
        torch.testing.assert_close(before, ranks[1][mode][0], rtol=0, atol=0)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert message == ranks[1][mode][2]
        assert "gradient of layer '0'" in message
        assert not torch.equal(before["0.T_packed"], make_model().state_dict()["0.T_packed"])
