"""What was trained is what is served."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from ternarize import from_pretrained, save_pretrained
from ternarize.api import freeze, is_ternary
from ternarize.errors import CheckpointError, ConfigError
from ternarize.evaluate import load
from ternarize.generate import generate
from ternarize.layer import ternary_layers
from ternarize.train.curves import draw_curves
from ternarize.train.model import build_model, read_model_config
from ternarize.train.run import RunFolder, Source, export, start
from ternarize.train.settings import TrainSettings
from tests.train.kit import SETTINGS, VARIANTS, Tiny

IDS = torch.arange(16)[None]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_model_that_is_served_is_the_one_that_was_trained(settings: TrainSettings, tiny: Tiny) -> None:
    trainer = tiny.start(dataclasses.replace(settings, steps=2))
    tiny.train(trainer)
    trainer.model.eval()
    trained = trainer.model(input_ids=IDS).logits
    destination = RunFolder(tiny.path / "run").model
    for _ in range(2):
        export(trainer.model, Source(texts=(tiny.text,)), destination)
    model, tokenizer = load(destination, device="cpu")
    assert torch.equal(model(input_ids=IDS).logits, trained)
    assert is_ternary(model) == (settings.rule in ("factored", "sign"))
    assert not any(layer.trainable for _, layer in ternary_layers(model))
    assert tokenizer("abc").input_ids == list(b"abc")
    assert generate(model, tokenizer, "3 times ", max_new_tokens=4).tokens == 4
    if settings.rule == "ste":
        assert model.get_parameter("model.layers.0.mlp.up_proj.weight").unique().numel() == 3


def test_a_trained_model_goes_through_freeze_and_save_pretrained(tiny: Tiny) -> None:
    trainer = tiny.start()
    trainer.train_step()
    model = freeze(trainer.model).eval()
    save_pretrained(model, tiny.path / "saved")
    assert torch.equal(from_pretrained(tiny.path / "saved")(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_any_config_of_transformers_trains(tiny: Tiny, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=16, eos_token_id=None)
    config.save_pretrained(tmp_path / "gpt2")
    trainer = start(
        RunFolder(tiny.path / "run"),
        SETTINGS,
        Source(texts=(tiny.text,)),
        lambda vocabulary: read_model_config(tmp_path / "gpt2", vocabulary=vocabulary),
        device=torch.device("cpu"),
        compiled=False,
    )
    assert type(trainer.model).__name__ == "GPT2LMHeadModel"
    assert len(list(ternary_layers(trainer.model))) == 4
    assert tiny.train(trainer)


def test_a_config_too_small_for_its_tokens_is_refused(tmp_path: Path) -> None:
    GPT2Config(vocab_size=256, n_positions=16).save_pretrained(tmp_path)
    config = read_model_config(tmp_path, vocabulary=256)
    with pytest.raises(ConfigError, match="has vocab_size 256, the tokenizer 257: raise it"):
        read_model_config(tmp_path, vocabulary=257)
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has 16 positions, ctx is 17: raise"):
        build_model(config, TrainSettings(ctx=17), torch.device("cpu"))


def test_a_config_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="has vocab_size 0, the tokenizer 256"):
        read_model_config(tmp_path, vocabulary=256)


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "no such"}', '{"vocab_size": 256}'])
def test_what_is_no_config_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no config of a transformers model"):
        read_model_config(tmp_path / "config.json", vocabulary=256)


def test_curves_are_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": i, "loss": None if i == 3 else 1 / i, "validation": 1.0 if i == 4 else None} for i in (1, 3, 4)]
    draw_curves({"one": records, "$\\q$": records[:1], "a\udcff": records, "_": records}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [[], [5.0], [None, None], [0.0, 0.0]], ids=["none", "one", "not finite", "zero"])
def test_curves_of_losses_without_a_logarithm_are_drawn_too(tmp_path: Path, losses: list[float | None]) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": i, "loss": loss, "validation": loss} for i, loss in enumerate(losses, start=1)]
    draw_curves({"run": records}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_of_a_run_says_how_it_is_quantised(tiny: Tiny) -> None:
    trainer = tiny.start()
    export(trainer.model, Source(texts=(tiny.text,)), tiny.path / "model")
    config = json.loads((tiny.path / "model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "ternarize"
