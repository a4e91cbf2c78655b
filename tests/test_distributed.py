"""Data parallel training by two processes over gloo: equal to each other, and to what the documentation says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from ternarize import TernaryOptimizer
from ternarize.distributed import RANK_SHIFT
from ternarize.layer import STAGE, TernaryLinear
from tests.distributed_kit import OPTIONS, RANKS, SCENARIOS, STEPS, batch, loss_of, make_model, run_rank
from tests.optim_kit import every_form

STEPPED = [name for name in SCENARIOS if name.startswith(("steps", "accumulated", "hooks"))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=RANKS)  # type: ignore[attr-defined, no-untyped-call]  # of torch
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def layers_of(model: torch.nn.Module) -> list[TernaryLinear]:
    return [layer for layer in model.modules() if isinstance(layer, TernaryLinear)]


@pytest.mark.parametrize("scenario", STEPPED)
def test_replicas_stay_equal_bit_for_bit(ranks: list[dict[str, Any]], scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    same(first, second)
    start = make_model(scenario.split()[1]).state_dict()
    assert not torch.equal(first[0]["0.T_packed"], start["0.T_packed"])
    # The random numbers that are saved are those of no rank.
    assert [entry["rng"].tolist() for entry in first[1].values()] == [[9, 0, STEPS], [9, 1, STEPS]]


@every_form
def test_ranks_step_as_one_process_that_adds_up_what_each_of_them_staged(
    ranks: list[dict[str, Any]], form: str
) -> None:
    replicas = [make_model(form) for _ in range(RANKS)]
    optimizers = [TernaryOptimizer(model, **OPTIONS) for model in replicas]
    for step in range(STEPS):
        for rank, model in enumerate(replicas):
            for layer in layers_of(model):
                layer.rng[1] += rank << RANK_SHIFT
            loss_of(model, batch(step, rank)).backward()
        for layer, other in zip(*map(layers_of, replicas), strict=True):
            for name in STAGE:
                if getattr(layer, name) is not None:
                    getattr(layer, name).add_(getattr(other, name))
            layer.status[1] += 1
        optimizers[0].step()
        # The other replica follows: its own step only clears what it staged.
        optimizers[1].zero_grad()
        replicas[1].load_state_dict(replicas[0].state_dict())
        for layer, other in zip(*map(layers_of, replicas), strict=True):
            other.rng.copy_(layer.rng)
    same(ranks[0][f"steps {form}"][0], replicas[0].state_dict())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_votes_of_ranks_are_those_of_as_many_micro_batches(ranks: list[dict[str, Any]], micro_batches: int) -> None:
    model = make_model("sign")
    optimizer = TernaryOptimizer(model, **OPTIONS)
    for step in range(STEPS):
        for rank in range(RANKS):
            for micro in range(micro_batches):
                loss_of(model, batch(step, rank, micro)).backward()
        optimizer.step()
    same(ranks[0]["steps sign" if micro_batches == 1 else "accumulated sign"][0], model.state_dict())


def test_what_is_not_finite_on_one_rank_refuses_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    for before, messages, refused, after, skipped in (rank["nonfinite"] for rank in ranks):
        same(refused, before)
        assert skipped == len(messages) == 3
        assert "gradient of layer '0', gradient of layer '2' not finite" in messages[0]
        assert "nothing was changed: gradient of layer '0' not finite" in messages[1]
        assert "nothing was changed: the loss not finite" in messages[2]
        assert not torch.equal(after["0.T_accum"], before["0.T_accum"])
    assert ranks[0]["nonfinite"][1] == ranks[1]["nonfinite"][1]
    same(ranks[0]["nonfinite"][3], ranks[1]["nonfinite"][3])


def test_a_skipped_step_is_skipped_and_counted_on_all(ranks: list[dict[str, Any]]) -> None:
    for before, after, skipped in (rank["skipped"] for rank in ranks):
        same(after, before)
        assert skipped == 1


@pytest.mark.parametrize("scenario", ["ddp", "optimizer, ddp"])
def test_float_parameters_under_ddp_and_accumulation_without_synchronisation(
    ranks: list[dict[str, Any]], scenario: str
) -> None:
    (start, first), (_, second) = (rank[scenario] for rank in ranks)
    same(first, second)
    moved = {name for name in first if not torch.equal(first[name], start[name])}
    assert {"embed.weight", "layer.T_packed", "layer.T_accum", "layer.row_log2", "norm.weight"} <= moved


def test_float_parameters_sharded_by_fsdp_beside_whole_ternary_layers(ranks: list[dict[str, Any]]) -> None:
    for start, whole, before, after, message in (rank["fsdp"] for rank in ranks):
        assert all(not torch.equal(a, b) for a, b in zip(start, whole, strict=True))
        same(after, before)
        assert "gradient of layer 'layer'" in message
    for part in range(1, 4):
        same(ranks[0]["fsdp"][part], ranks[1]["fsdp"][part])


def test_a_ternary_overflow_on_one_rank_lowers_every_scale(ranks: list[dict[str, Any]]) -> None:
    for before, scales, after in (rank["scaled"] for rank in ranks):
        assert scales == [2.0, 2.0]
        assert not torch.equal(after["0.row_log2"], before["0.row_log2"])
    same(ranks[0]["scaled"], ranks[1]["scaled"])


def test_sums_are_limited_and_never_wrap(ranks: list[dict[str, Any]]) -> None:
    for done, stages, statuses, (row, col) in (rank["sums"] for rank in ranks):
        assert done == [0, 1, 2]
        for i, stage in enumerate(stages):
            expected = torch.full_like(stage, 127 if i == 0 else -127)
            # 3 and -2.
            expected.view(-1)[i] = 1
            assert torch.equal(stage, expected)
        assert [status.tolist() for status in statuses] == [[0, 3]] * 3
        assert row.tolist() == [2 * i + 1 for i in range(8)]
        assert col.tolist() == [2 * i + 1 for i in range(16)]


def test_a_rank_without_a_micro_batch_adds_nothing(ranks: list[dict[str, Any]]) -> None:
    for stage, status in (rank["sums of one rank"] for rank in ranks):
        assert (stage == 3).all()
        assert status.tolist() == [0, 1]


def test_a_group_says_whose_gradients_are_summed(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        model = make_model()
        optimizer = TernaryOptimizer(model, **OPTIONS)
        loss_of(model, batch(0, rank)).backward()
        optimizer.step()
        after, error = results["group"]
        same(after, model.state_dict())
        assert "not in process_group: make the optimizer on its ranks only" in error


def test_updates_inside_backward_are_for_one_process(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert 'use "step" with several' in results["backward"]


def test_layers_that_fsdp_has_sharded_are_refused(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        by_torch = "only Tensors of floating point dtype can require gradients" in results["sharded"]
        assert by_torch or "parameters of layer 'layer' are sharded" in results["sharded"]
