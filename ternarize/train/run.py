"""A run in its folder: made new, continued, and at its end turned into a model that is served."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternarize.api import freeze, is_ternary
from ternarize.checkpoint import save_pretrained
from ternarize.checkpoint.write import new_file, new_folder, write_json
from ternarize.distributed import Replicas
from ternarize.errors import CheckpointError, ConfigError, out_of_memory
from ternarize.evaluate import require_transformers, without_progress_bars
from ternarize.train.checkpoint import load_checkpoint
from ternarize.train.curves import read_log
from ternarize.train.data import fingerprints, open_tokens, require_unchanged, write_tokens
from ternarize.train.loop import Trainer
from ternarize.train.model import bake, build_model
from ternarize.train.settings import TrainSettings
from ternarize.train.tokenizer import byte_tokenizer, read_tokenizer, save_tokenizer, vocabulary_size

RUN_FILE = "run.json"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run are."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """State to continue from."""
        return self.path / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """A JSON object a step."""
        return self.path / "log.jsonl"

    @property
    def curves(self) -> Path:
        """Picture of the log."""
        return self.path / "curves.png"

    @property
    def model(self) -> Path:
        """The trained model, as `ternarize generate` and `eval` read it."""
        return self.path / "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What a run learns from."""

    texts: tuple[Path, ...]
    """The training text, one file after the other."""
    validation: Path | None = None
    """Another text to measure on; None: the last 5 % of the training text, which is then not trained on."""
    tokenizer: Path | None = None
    """A tokenizer.json; None: bytes are tokens."""

    def read_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`, which for bytes is one too."""
        return byte_tokenizer() if self.tokenizer is None else read_tokenizer(self.tokenizer)

    def as_dict(self) -> dict[str, Any]:
        """Absolute paths, and what is in the tokenizer, of which the run has no copy."""
        return {
            "text": [str(text.resolve()) for text in self.texts],
            "validation": None if self.validation is None else str(self.validation.resolve()),
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer.resolve()),
            "tokenizer_sha256": None
            if self.tokenizer is None
            else hashlib.sha256(self.tokenizer.read_bytes()).hexdigest(),
        }


def start(
    folder: RunFolder,
    settings: TrainSettings,
    source: Source,
    model_config: Callable[[int], Any],
    *,
    device: torch.device,
    compiled: bool,
    skip_nonfinite: bool = False,
    resume: bool = False,
) -> Trainer:
    """Make a run's folder, or open it again, and return its trainer.

    Of several processes, all of which call this, the first one makes the folder.

    Args:
        folder: which must not exist, or with ``resume`` hold a run of the same settings, source and model.
        settings: of the run.
        source: read once; a run that is resumed has its own copy of the tokens.
        model_config: from the number of tokens to a transformers config.
        device: to train on.
        compiled: as of `Trainer`.
        skip_nonfinite: likewise.
        resume: continue from the last checkpoint, or from the start if the run stopped before its first.

    Raises:
        ConfigError: for a text that is too short, or settings that are not the run's.
        CheckpointError: if the folder exists, or holds no run to resume.
    """
    tokenizer = source.read_tokenizer()
    config = model_config(vocabulary_size(tokenizer))
    description = {
        "settings": dataclasses.asdict(settings),
        "source": source.as_dict(),
        "model": json.loads(config.to_json_string()),
    }
    replicas = Replicas()
    first = replicas.rank == 0
    # Before there is a folder, which would have to be removed before the right call.
    settings.check_processes(replicas.size)
    if resume:
        _require_same(folder.path, description)
    elif first and folder.path.is_dir() and any(folder.path.iterdir()):
        raise CheckpointError(f"{folder.path} exists: continue its run with --resume, or name another folder")
    model = build_model(config, settings, device)
    if first and not resume:
        with new_folder(folder.path, force=False) as partial:
            write_tokens(partial, source.texts, source.validation, source.tokenizer and tokenizer)
            open_tokens(partial, tokenizer).check(settings.ctx)
            write_json(partial / RUN_FILE, {**description, "tokens": fingerprints(partial)})
    # The others wait for the first one's files.
    replicas.any(False, device)
    trainer = Trainer(
        model, settings, open_tokens(folder.path, tokenizer), compiled=compiled, skip_nonfinite=skip_nonfinite
    )
    if folder.checkpoint.exists():
        state = load_checkpoint(folder.checkpoint)
        try:
            trainer.load_state_dict(state)
            if not 0 <= trainer.step <= settings.steps:
                raise ValueError(f"its step is {trainer.step} of {settings.steps}")
        # Optimizers raise whatever comes to them.
        except Exception as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{folder.checkpoint} holds no state of this run ({error}): put it back, or start the run again in "
                "another folder"
            ) from None
    # Steps after the checkpoint are made, and logged, again.
    if first and folder.log.is_file():
        lines = [json.dumps(record) + "\n" for record in read_log(folder.log, trainer.step)]
        with new_file(folder.log) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
    return trainer


def export(model: nn.Module, source: Source, destination: Path) -> None:
    """Write what was trained as what is served, with its tokenizer, for `ternarize generate` and `eval`.

    Args:
        model: loses its training state: a ternary one is frozen, a straight-through one keeps its rounded weights.
        source: of the run.
        destination: replaced if it exists, by the whole of the new one.

    Raises:
        CheckpointError: if it cannot be written.
    """
    tokenizer = source.read_tokenizer()
    with new_folder(destination, force=True) as partial, without_progress_bars(require_transformers()):
        if is_ternary(model):
            save_pretrained(freeze(model), partial)
        try:
            if not is_ternary(model):
                bake(model).save_pretrained(partial)  # type: ignore[operator]  # a method that transformers adds
            save_tokenizer(tokenizer, partial)
        # Of a full disk, the libraries below transformers raise whatever they have.
        except Exception as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(
                f"{destination} cannot be written ({error}): free some space and go on with --resume"
            ) from None


def _require_same(folder: Path, description: dict[str, Any]) -> None:
    """Refuse to resume a run with anything that would make it another one."""
    file = folder / RUN_FILE
    if not file.exists():
        raise CheckpointError(f"{folder} holds no run to resume, it has no {RUN_FILE}: start one in a new folder")
    try:
        former: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        changes = [
            f"{key} is {value!r}, was {former[section].get(key)!r}"
            for section, values in description.items()
            for key, value in values.items()
            if key != "transformers_version" and value != former[section].get(key)
        ]
        if not changes:
            require_unchanged(folder, former["tokens"])
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error!r}): put it back, or start the run again in another folder"
        ) from None
    if changes:
        raise ConfigError(f"{folder} is a run of other settings: {', '.join(changes)}; repeat its own arguments")
