"""Training by two processes: each has its share of the windows, one writes, and a resumed run is the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from ternarize.train.checkpoint import load_checkpoint
from ternarize.train.run import RunFolder
from tests.train.kit import SETTINGS, VARIANTS, Tiny
from tests.train.ranks import RANKS, STOPPED, run_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("ranks")
    (path / "text.txt").write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(100)), encoding="utf-8")
    torch.multiprocessing.spawn(run_rank, (str(path),), nprocs=RANKS)  # type: ignore[attr-defined, no-untyped-call]  # of torch
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_ranks_are_equal_and_a_resumed_run_is_the_uninterrupted_one(folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert [rank["stopped"] for rank in ranks] == [STOPPED, STOPPED]
    for rank in ranks:
        same(rank["part"], rank["whole"])
        same(rank["whole"], ranks[0]["whole"])
    tiny = Tiny(folder / "text.txt", folder)
    assert tiny.records("part") == tiny.records("whole")
    assert [record["step"] for record in tiny.records("whole")] == list(range(1, SETTINGS.steps + 1))
    same(*(load_checkpoint(RunFolder(folder / name).checkpoint) for name in ("part", "whole")))


def test_shares_add_up_to_the_step_of_one_process(folder: Path, ranks: list[dict[str, Any]]) -> None:
    alone = Tiny(folder / "text.txt", folder).start(VARIANTS["dense"], "alone")
    losses = [alone.train_step() for _ in range(2)]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-5)
        assert rank["validation"] == pytest.approx(alone.validate(), rel=1e-5)
        torch.testing.assert_close(rank["dense"], alone.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_micro_batch_that_cannot_be_shared_is_refused_before_there_is_a_folder(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    assert all("2 processes cannot share batch=3 windows: use a multiple" in rank["odd"] for rank in ranks)
    assert not (folder / "odd").exists()


@pytest.mark.slow
def test_torchrun_starts_it_and_the_first_process_tells(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(100)), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tiny = ["--hidden", "64", "--layers", "1", "--ctx", "16", "--batch", "2", "--steps", "2", "--device", "cpu"]
    call = ["-m", "ternarize.train", "--text", str(text), "--out", str(tmp_path / "run"), *tiny, "--json"]
    done = subprocess.run([*launch, *call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
