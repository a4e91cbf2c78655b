"""What the tests of training share: a run of a one-block decoder that takes a fraction of a second."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ternarize.train.loop import StepRecord, Trainer, train
from ternarize.train.model import builtin_config
from ternarize.train.run import RunFolder, Source, start
from ternarize.train.settings import TrainSettings

SETTINGS = TrainSettings(ctx=16, batch=2, accum=2, steps=6, warmup=2)

#: Every way to learn.
VARIANTS: dict[str, TrainSettings] = {
    "int8": SETTINGS,
    "int4": dataclasses.replace(SETTINGS, accumulator="int4"),
    "sign": dataclasses.replace(SETTINGS, rule="sign"),
    "ste": dataclasses.replace(SETTINGS, rule="ste"),
    "dense": dataclasses.replace(SETTINGS, rule="dense"),
}


def tiny_config(vocabulary: int) -> Any:
    return builtin_config(hidden=64, layers=1, ctx=16, vocabulary=vocabulary)


def nothing(_: StepRecord) -> None:
    pass


@dataclasses.dataclass
class Tiny:
    """Runs on one text, each in a folder."""

    text: Path
    path: Path

    def start(self, settings: TrainSettings = SETTINGS, folder: str = "run", **options: Any) -> Trainer:
        return start(
            RunFolder(self.path / folder),
            settings,
            Source(texts=(self.text,)),
            tiny_config,
            device=torch.device("cpu"),
            compiled=False,
            **options,
        )

    def train(
        self,
        trainer: Trainer,
        folder: str = "run",
        *,
        save_every: int = 100,
        eval_every: int = 100,
        on_step: Callable[[StepRecord], None] = nothing,
    ) -> bool:
        paths = RunFolder(self.path / folder)
        return train(
            trainer,
            checkpoint=paths.checkpoint,
            log=paths.log,
            save_every=save_every,
            eval_every=eval_every,
            on_step=on_step,
        )

    def records(self, folder: str = "run") -> list[dict[str, Any]]:
        """The log without the times, which differ from run to run."""
        lines = RunFolder(self.path / folder).log.read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
