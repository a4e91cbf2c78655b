"""TernaryOptimizer and build_optimizer in eager mode: what a step does, what is saved, how torch's tools use them."""

import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryLinear, TernaryOptimizer, build_optimizer
from ternarize.errors import CheckpointError, ConfigError
from ternarize.packing import unpack
from tests.optim_kit import FORMS, changed, every_form, make_layer, push, snapshot


class Mixed(nn.Module):
    """Float and ternary parameters: an embedding, two ternary layers and a gain."""

    def __init__(self, form: str = "int8") -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.up = make_layer(32, 64, form)
        self.down = make_layer(64, 16, form)
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.down(torch.relu(self.up(self.embed(tokens)))) * self.gain
        return logits


def next_token_loss(model: nn.Module, seed: int) -> Tensor:
    """Cross-entropy of a fixed permutation of tokens, on a batch that the seed picks."""
    tokens = torch.randint(0, 16, (64,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens), (5 * tokens + 3) % 16)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        loss = next_token_loss(model, seed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trits(layer: TernaryLinear) -> Tensor:
    return unpack(layer.T_packed, layer.in_features, layer.group_size)


def trained(group: dict[str, Any]) -> list[Tensor]:
    """The trits in a group, without what stands there for a GradScaler."""
    return [parameter for parameter in group["params"] if parameter.dtype == torch.uint8]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]  # torch.load is untyped


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# What is optimized.


def test_layers_of_each_form_get_a_group_with_its_own_learning_rate() -> None:
    layers = {form: make_layer(16, 8, form) for form in FORMS}
    groups = TernaryOptimizer(nn.ModuleDict(layers)).param_groups
    assert [group["lr"] for group in groups] == [20 / 254, 14 / 254, 1.0]
    assert all(trained(group) == [layer.T_packed] for group, layer in zip(groups, layers.values(), strict=True))
    assert [layer.rng.tolist() for layer in layers.values()] == [[0, 0, 0], [0, 1, 0], [0, 2, 0]]
    assert [layer.name for layer in layers.values()] == list(FORMS)


def test_modules_layers_and_group_dicts_are_accepted_alike() -> None:
    first, second = make_layer(16, 8), make_layer(8, 4)
    block = nn.Sequential(first, nn.ReLU(), second)
    spellings: list[Any] = [
        block,
        [first, second],
        [block],
        [{"params": block}],
        [{"params": [first]}, {"params": second}],
    ]
    for params in spellings:
        optimizer = TernaryOptimizer(params, lr=0.5)
        assert [p for group in optimizer.param_groups for p in trained(group)] == [first.T_packed, second.T_packed]
    optimizer = TernaryOptimizer([{"params": first, "lr": 0.25, "threshold": 3}, {"params": second}], lr=0.5)
    assert [(group["lr"], group["threshold"]) for group in optimizer.param_groups] == [(0.25, 3), (0.5, 16)]


def test_a_tied_layer_is_optimized_once_and_a_frozen_one_among_others_not_at_all() -> None:
    layer, frozen = make_layer(8, 8), make_layer(8, 8)
    frozen.freeze()
    (group,) = TernaryOptimizer([layer, nn.Sequential(layer, frozen)]).param_groups
    assert trained(group) == [layer.T_packed]


def test_what_cannot_be_optimized_is_refused_with_what_to_do() -> None:
    layer = make_layer(16, 8)
    with pytest.raises(ConfigError, match="pass the model or its TernaryLinear layers"):
        TernaryOptimizer(layer.parameters())  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ConfigError, match=r"call ternarize\(model\) first"):
        TernaryOptimizer(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"call ternarize\(model\) first"):
        build_optimizer(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="'later' is unknown: use one of step, backward, hooks"):
        TernaryOptimizer(layer, apply="later")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ConfigError, match="threshold=128"):
        TernaryOptimizer(layer, threshold=128)
    with pytest.raises(ConfigError, match="lr=-1 is negative"):
        TernaryOptimizer(layer, lr=-1)
    with pytest.raises(ConfigError, match="32 bits"):
        TernaryOptimizer(layer, seed=2**32)
    with pytest.raises(ConfigError, match="already made"):
        build_optimizer(Mixed(), torch.optim.SGD([torch.zeros(1)]), lr=0.1)
    layer.freeze()
    with pytest.raises(ConfigError, match="trainable=True"):
        TernaryOptimizer(layer)


def test_seed_and_step_stay_when_a_layer_is_moved() -> None:
    layer = make_layer(16, 8)
    TernaryOptimizer([make_layer(8, 8), layer], seed=7)
    layer._reset_transients()
    assert layer.rng.tolist() == [7, 1, 0]


# What a step does.


@every_form
def test_loss_falls_on_a_small_task(form: str) -> None:
    model = Mixed(form)
    # Only the ternary layers learn. The rate decays: at a constant one, `sign` goes on voting on vanishing gradients.
    optimizer = TernaryOptimizer(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=60)
    losses = []
    for seed in range(60):
        losses += train(model, optimizer, range(seed, seed + 1))
        schedule.step()
    assert sum(losses[-5:]) / 5 < 0.2 * losses[0]


@every_form
def test_a_constant_positive_gradient_moves_every_trit_down(form: str) -> None:
    layer = make_layer(16, 8, form, trit=1)
    push(layer, TernaryOptimizer(layer), 1.0, 150)
    assert (trits(layer) == -1).all()


@every_form
def test_saturated_accumulators_neither_wrap_nor_stick(form: str) -> None:
    layer = make_layer(16, 8, form, trit=1)
    optimizer = TernaryOptimizer(layer)
    push(layer, optimizer, -1.0, 150)
    assert (trits(layer) == 1).all()
    push(layer, optimizer, 1.0, 150)
    assert (trits(layer) == -1).all()


def test_exponents_step_under_sign_at_their_own_threshold() -> None:
    layer = make_layer(16, 8, "sign", trit=1)
    optimizer = TernaryOptimizer(layer, threshold=127, exponent_threshold=3)
    before = layer.E.clone()
    push(layer, optimizer, 1.0, 2)
    assert torch.equal(layer.E, before)
    push(layer, optimizer, 1.0, 1)
    # All of T·2^E should fall: smaller is what E can do about it.
    assert torch.equal(layer.E, before - 1)


@pytest.mark.parametrize(("last", "gradient"), [(-126, 1), (127, -1)])
def test_exponents_stop_at_both_ends(last: int, gradient: int) -> None:
    layer = make_layer(16, 8, "sign", trit=1)
    layer.E.fill_(last)
    optimizer = TernaryOptimizer(layer, threshold=127, exponent_threshold=1)
    push(layer, optimizer, gradient, 3)
    assert torch.equal(layer.E, torch.full_like(layer.E, last))
    push(layer, optimizer, -gradient, 1)
    assert torch.equal(layer.E, torch.full_like(layer.E, last + gradient))


@every_form
def test_an_all_zero_gradient_moves_no_weight_and_learning_goes_on_after_it(form: str) -> None:
    layer = make_layer(16, 8, form, trit=1)
    optimizer = TernaryOptimizer(layer)
    before = snapshot(layer)
    push(layer, optimizer, 0.0, 3)
    # The statistics of `factored` do move.
    assert {"row_log2", "col_log2"}.issuperset(changed(layer, before))
    push(layer, optimizer, 1.0, 150)
    assert (trits(layer) == -1).all()


@every_form
def test_a_learning_rate_of_zero_changes_nothing(form: str) -> None:
    layer = make_layer(16, 8, form, trit=0)
    assert layer.T_accum is not None
    # On the threshold, where an update of nothing would step; 7 is the accumulator's nibble alone.
    layer.T_accum.fill_({"int8": 127, "int4": 7, "sign": 16}[form])
    before = snapshot(layer)
    push(layer, TernaryOptimizer(layer, lr=0, exponent_threshold=1), 1.0, 3)
    assert changed(layer, before) == []


@every_form
def test_a_layer_without_gradient_stays_as_it_is(form: str) -> None:
    used, unused = make_layer(16, 8, form), make_layer(16, 8, form)
    before, before_used = snapshot(unused), snapshot(used)
    optimizer = TernaryOptimizer([used, unused])
    for _ in range(2):
        used(torch.randn(4, 16)).sum().backward()
        optimizer.step()
    assert changed(unused, before) == []
    assert "T_accum" in changed(used, before_used)


@every_form
def test_frozen_layers_among_others_stay_as_they_are_and_pass_the_gradient_on(form: str) -> None:
    model = nn.Sequential(make_layer(16, 16, form), make_layer(16, 16, form), make_layer(16, 16, form))
    frozen, first = model[1], model[0]
    assert isinstance(frozen, TernaryLinear)
    frozen.freeze()
    before, twin = snapshot(model), copy.deepcopy(model)
    optimizer, twins = TernaryOptimizer(model), TernaryOptimizer(twin)
    for seed in range(3):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        # The same, with a dense matrix in the frozen layer's place.
        y = twin[2](twin[0](x) @ frozen.weight.t())
        y.square().sum().backward()
        twins.step()
    moved = changed(model, before)
    assert not any(name.startswith("1.") for name in moved)
    assert {"0.T_accum", "2.T_accum"} <= set(moved)
    assert isinstance(first, TernaryLinear)
    assert changed(first, twin[0].state_dict()) == []


def test_zero_grad_drops_what_backward_staged() -> None:
    layer = make_layer(16, 8)
    optimizer = TernaryOptimizer(layer)
    push(layer, optimizer, 1.0, 1)
    before = snapshot(layer)
    layer(torch.full((1, 16), torch.nan)).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert changed(layer, before) == []


def test_a_closure_gives_the_gradient_and_its_loss_is_returned() -> None:
    layer = make_layer(16, 8, "sign", trit=1)
    optimizer = TernaryOptimizer(layer, threshold=1)

    def closure() -> Tensor:
        loss: Tensor = layer(torch.ones(1, 16)).sum()
        loss.backward()
        return loss

    expected = layer(torch.ones(1, 16)).sum()
    assert torch.equal(optimizer.step(closure), expected)
    assert (trits(layer) == 0).all()
    assert optimizer.step(loss=2.5) == 2.5
    assert optimizer.step() is None


# State, and torch's own tools.


@every_form
@pytest.mark.parametrize("joint", [False, True])
def test_a_resumed_run_is_bit_identical(form: str, joint: bool) -> None:
    def make(seed: int) -> tuple[Any, ...]:
        model = Mixed(form)
        optimizer = build_optimizer(model, ternary={"seed": seed}) if joint else TernaryOptimizer(model, seed=seed)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def run(trio: tuple[Any, ...], seeds: range) -> None:
        for seed in seeds:
            train(trio[0], trio[1], range(seed, seed + 1))
            trio[2].step()

    straight = make(seed=3)
    run(straight, range(5))
    saved = [through_a_file(part.state_dict()) for part in straight]
    run(straight, range(5, 10))
    # Another seed: what counts is the saved one.
    resumed = make(seed=4)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    run(resumed, range(5, 10))
    assert changed(resumed[0], straight[0].state_dict()) == []
    assert resumed[0].up.rng.tolist() == [3, 0, 10]


def test_optimizer_state_is_small_and_foreign_state_is_refused() -> None:
    layer = make_layer(16, 8)
    optimizer = TernaryOptimizer(layer)
    state = optimizer.state_dict()
    assert {name: tensor.numel() for name, tensor in state["state"][0].items()} == {"rng": 3, "skipped_steps": 1}
    with pytest.raises(CheckpointError, match="no 'rng' for layer"):
        optimizer.load_state_dict({**state, "state": {}})


@pytest.mark.parametrize("fused", [False, True])
def test_build_optimizer_trains_floats_and_trits_as_one(fused: bool) -> None:
    model = Mixed()
    optimizer = build_optimizer(model, lr=1e-2, fused=fused)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 20 / 254]
    before, losses = snapshot(model), train(model, optimizer, range(100))
    assert sum(losses[-5:]) / 5 < 0.2 * losses[0]
    assert before.keys() - changed(model, before) == {"up.E", "down.E"}


def test_the_float_part_steps_as_the_float_optimizer_would_alone() -> None:
    model = Mixed()
    twin = copy.deepcopy(model)
    joint = build_optimizer(model, functools.partial(torch.optim.SGD, momentum=0.9), lr=0.1, ternary={"lr": 0})
    alone = torch.optim.SGD([twin.embed.weight, twin.gain], lr=0.1, momentum=0.9)
    assert train(model, joint, range(5)) == train(twin, alone, range(5))
    assert torch.equal(model.embed.weight, twin.embed.weight)


def test_an_optimizer_already_made_keeps_its_groups() -> None:
    model = Mixed()
    made = torch.optim.AdamW([{"params": [model.gain], "lr": 0.5}, {"params": [model.embed.weight], "weight_decay": 0}])
    optimizer = build_optimizer(model, made, ternary={"lr": 0.2})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3, 0.2]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in made.param_groups] == [0.25, 5e-4]


def test_a_model_without_float_parameters_gets_one_optimizer_all_the_same() -> None:
    model = nn.Sequential(make_layer(16, 8))
    optimizer = build_optimizer(model, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [20 / 254]


def test_sparse_gradients_of_embeddings_are_checked_too() -> None:
    model = Mixed()
    model.embed.sparse = True
    optimizer = build_optimizer(model, torch.optim.SGD, lr=0.1)
    before = snapshot(model)
    train(model, optimizer, range(2))
    assert "embed.weight" in changed(model, before)


def test_grad_scaler_skips_the_whole_step_and_lowers_its_scale() -> None:
    model = Mixed()
    optimizer = build_optimizer(model)
    scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=4.0)

    def scaled_step(factor: float) -> None:
        scaler.scale(next_token_loss(model, 0) * factor).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert bool(norm.isfinite()) == (factor == 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaled_step(1.0)
    before = snapshot(model)
    scaled_step(torch.inf)
    assert changed(model, before) == []
    assert scaler.get_scale() == 2.0
    scaled_step(1.0)
    assert {"embed.weight", "gain", "up.T_accum", "down.T_accum"}.issubset(changed(model, before))
