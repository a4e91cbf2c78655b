"""Steps of every rule: resumed, accumulated, refused, interrupted."""

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize.errors import CheckpointError, ConfigError, NonFiniteError
from ternarize.layer import ternary_layers
from ternarize.train.checkpoint import load_checkpoint, save_checkpoint
from ternarize.train.data import windows
from ternarize.train.loop import StepRecord, next_token_loss
from ternarize.train.model import make_optimizer
from ternarize.train.run import RunFolder
from ternarize.train.settings import TrainSettings
from tests.train.kit import SETTINGS, VARIANTS, Tiny

every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def poison(model: nn.Module) -> None:
    """Make every later loss NaN."""
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").fill_(torch.nan)


def test_small_ternary_training_loss_finite(tiny: Tiny) -> None:
    trainer = tiny.start(dataclasses.replace(SETTINGS, steps=40, batch=4, float_lr=1e-2))
    assert tiny.train(trainer)
    losses = [record["loss"] for record in tiny.records()]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) / 4 < losses[0] - 2
    assert tiny.records()[-1]["validation"] < losses[0] - 2
    assert not any(p.is_floating_point() for _, layer in ternary_layers(trainer.model) for p in layer.parameters())


def test_ternary_update_rejects_nonfinite_loss(tiny: Tiny) -> None:
    trainer = tiny.start()
    trainer.train_step()
    poison(trainer.model)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"the loss of step 2 is nan, the state is that of step 1: .*skip"):
        trainer.train_step()
    same(trainer.model.state_dict(), before)
    # It stopped before backward: nothing is staged.
    assert not any(layer.status.any() for _, layer in ternary_layers(trainer.model))
    assert trainer.step == 1


@every_variant
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(settings: TrainSettings, tiny: Tiny) -> None:
    whole = tiny.start(settings, "whole")
    assert tiny.train(whole, "whole", eval_every=2)

    def stop(record: StepRecord) -> None:
        if record.step == 4:
            # As a crash after the step was logged: the last checkpoint is that of step 3.
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        tiny.train(tiny.start(settings), save_every=3, eval_every=2, on_step=stop)
    torch.manual_seed(123)
    trainer = tiny.start(settings, resume=True)
    assert trainer.step == 3
    assert tiny.train(trainer, eval_every=2)

    assert tiny.records() == tiny.records("whole")
    states = [load_checkpoint(RunFolder(tiny.path / name).checkpoint) for name in ("run", "whole")]
    same(*states)
    assert states[0]["step"] == settings.steps


@every_variant
def test_every_rule_sees_the_same_data_and_starts_from_the_same_weights(settings: TrainSettings, tiny: Tiny) -> None:
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].clone())

    trainer = tiny.start(settings)
    dense = tiny.start(VARIANTS["dense"], "dense")
    trainer.model.register_forward_pre_hook(watch, with_kwargs=True)
    for _ in range(2):
        trainer.train_step()
    expected = [windows(trainer.tokens.train, 16, 4, settings.seed, step)[:, :-1] for step in range(2)]
    assert torch.equal(torch.cat(seen), torch.cat(expected))
    fresh = tiny.start(settings, "fresh")
    assert torch.equal(
        fresh.model.get_parameter("model.embed_tokens.weight"), dense.model.get_parameter("model.embed_tokens.weight")
    )
    layers: list[Any] = [t.model.get_submodule("model.layers.0.mlp.up_proj") for t in (fresh, dense)]
    weight, original = (layer.weight.detach() for layer in layers)
    error = float((weight - original).square().sum() / original.square().sum())
    assert error < (0.3 if settings.rule != "dense" else 1e-12)


@every_variant
def test_micro_batches_are_backward_calls_before_one_step(settings: TrainSettings, tiny: Tiny) -> None:
    trainer = tiny.start(dataclasses.replace(settings, accum=4))
    by_hand = tiny.start(dataclasses.replace(settings, accum=4), "by_hand")
    optimizer = make_optimizer(by_hand.model, by_hand.settings, skip_nonfinite=False)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(3):
        trainer.train_step()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * settings.schedule(step)
        for batch in windows(trainer.tokens.train, 16, 8, settings.seed, step).split(2):
            (next_token_loss(by_hand.model, batch) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    same(trainer.model.state_dict(), by_hand.model.state_dict())


def test_a_dense_step_is_the_same_in_one_batch_and_in_several(tiny: Tiny) -> None:
    split, whole = (
        tiny.start(dataclasses.replace(VARIANTS["dense"], batch=batch, accum=accum), f"{batch}")
        for batch, accum in ((2, 4), (8, 1))
    )
    for _ in range(2):
        assert split.train_step() == pytest.approx(whole.train_step(), rel=1e-5)
    torch.testing.assert_close(split.model.state_dict(), whole.model.state_dict(), rtol=1e-3, atol=1e-4)


@every_variant
def test_an_error_leaves_the_last_checkpoint(settings: TrainSettings, tiny: Tiny) -> None:
    trainer = tiny.start(settings)

    def break_it(record: StepRecord) -> None:
        if record.step == 3:
            poison(trainer.model)

    with pytest.raises(NonFiniteError, match="loss of step 4 is nan"):
        tiny.train(trainer, save_every=2, on_step=break_it)
    state = load_checkpoint(RunFolder(tiny.path / "run").checkpoint)
    assert state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert tiny.records()[-1]["step"] == 3


@every_variant
def test_skipped_losses_change_nothing_and_are_counted(settings: TrainSettings, tiny: Tiny) -> None:
    trainer = tiny.start(settings, skip_nonfinite=True)
    trainer.train_step()
    poison(trainer.model)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert tiny.train(trainer)
    same(trainer.model.state_dict(), before)
    last = tiny.records()[-1]
    assert last["loss"] is last["validation"] is None
    assert last["skipped"] == trainer.skipped == 5


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_gradient_that_is_not_finite_is_refused_with_its_step(skip_nonfinite: bool, tiny: Tiny) -> None:
    trainer = tiny.start(skip_nonfinite=skip_nonfinite)
    trainer.model.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * torch.inf)
    if skip_nonfinite:
        trainer.train_step()
        assert trainer.skipped == 1
    else:
        with pytest.raises(NonFiniteError, match=r"^step 1: step refused.*model\.norm\.weight"):
            trainer.train_step()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_saves(number: signal.Signals, tiny: Tiny) -> None:
    former = signal.getsignal(number)

    def interrupt(record: StepRecord) -> None:
        if record.step == 2:
            signal.raise_signal(number)

    assert not tiny.train(tiny.start(), on_step=interrupt)
    assert load_checkpoint(RunFolder(tiny.path / "run").checkpoint)["step"] == 2
    assert signal.getsignal(number) is former


def test_a_checkpoint_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "checkpoint.pt"
    save_checkpoint(file, {"step": 1})

    def fail(state: object, partial: Path) -> None:
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(file, {"step": 2})
    assert load_checkpoint(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_checkpoint_is_named(tiny: Tiny) -> None:
    tiny.train(tiny.start(dataclasses.replace(SETTINGS, steps=1)))
    file = RunFolder(tiny.path / "run").checkpoint
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read"):
        tiny.start(dataclasses.replace(SETTINGS, steps=1), resume=True)


def test_only_the_same_run_is_resumed(tiny: Tiny) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        tiny.start(resume=True)
    tiny.start()
    with pytest.raises(CheckpointError, match="exists: continue its run with --resume"):
        tiny.start()
    with pytest.raises(ConfigError, match="run of other settings: steps is 7, was 6, seed is 1, was 0; repeat"):
        tiny.start(dataclasses.replace(SETTINGS, steps=7, seed=1), resume=True)


def test_a_run_that_cannot_start_leaves_no_folder(tiny: Tiny) -> None:
    tiny.text.write_text("short")
    with pytest.raises(ConfigError, match="ctx=16 needs 17"):
        tiny.start()
    assert not any(tiny.path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "adam"}, "rule='adam' is unknown"),
        ({"ctx": 0}, "ctx is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"float_lr": math.nan}, "float_lr is nan"),
        ({"lr": 1e39}, "lr is 1e\\+39: use 0 or more that float32 holds"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"rule": "dense", "accumulator": "int4"}, "a form of 'factored'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SETTINGS, **change)


def test_the_schedule_rises_then_falls_to_a_fiftieth() -> None:
    settings = TrainSettings(steps=2000, warmup=50)
    assert settings.schedule(0) == pytest.approx(1 / 50)
    assert settings.schedule(49) == pytest.approx(1, abs=2e-3)
    assert settings.schedule(1000) == pytest.approx(0.51)
    assert settings.schedule(1999) == pytest.approx(0.02, abs=1e-4)
