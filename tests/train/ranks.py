"""What two ranks do in test_processes.py: one process each, over gloo."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ternarize.errors import ConfigError
from ternarize.train.loop import StepRecord
from tests.distributed_kit import LIMIT
from tests.train.kit import SETTINGS, VARIANTS, Tiny

RANKS = 2

#: The step after which one process is told to stop.
STOPPED = 3


def stop(record: StepRecord) -> None:
    if record.step == STOPPED:
        signal.raise_signal(signal.SIGINT)


def run_rank(rank: int, folder: str) -> None:
    """A run that is stopped and resumed, one that is not, and dense steps; states and losses go to a file."""
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=LIMIT)
    tiny = Tiny(path / "text.txt", path)
    results: dict[str, Any] = {}
    whole = tiny.start(SETTINGS, "whole")
    assert tiny.train(whole, "whole", eval_every=2)
    part = tiny.start(SETTINGS, "part")
    assert not tiny.train(part, "part", eval_every=2, on_step=stop)
    results["stopped"] = part.step
    # Whatever a process drew before it was started again.
    torch.manual_seed(123 + rank)
    part = tiny.start(SETTINGS, "part", resume=True)
    assert tiny.train(part, "part", eval_every=2)
    results["whole"], results["part"] = whole.model.state_dict(), part.model.state_dict()
    dense = tiny.start(VARIANTS["dense"], "dense")
    results["losses"] = [dense.train_step() for _ in range(2)]
    results["validation"] = dense.validate()
    results["dense"] = dense.model.state_dict()
    try:
        tiny.start(dataclasses.replace(SETTINGS, batch=3), "odd")
    except ConfigError as error:
        results["odd"] = str(error)
    torch.save(results, path / f"{rank}.pt")
    dist.destroy_process_group()
