"""The training loop: steps, validation, and what is kept of them."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.backends import ternary
from ternarize.checkpoint.write import named
from ternarize.distributed import Replicas
from ternarize.errors import NonFiniteError
from ternarize.signals import stop_signal
from ternarize.train.checkpoint import save_checkpoint
from ternarize.train.data import Tokens, validation_windows, windows
from ternarize.train.model import make_optimizer
from ternarize.train.settings import TrainSettings

#: Model and tokens, int64 [B, ctx + 1], to their mean loss in nats.
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A line of log.jsonl."""

    step: int
    """Steps done, this one included."""
    loss: float | None
    """Mean over the tokens of the step, before its update, in nats a token; None if it was not finite."""
    validation: float | None
    """Mean over the validation windows after the step, where it was measured."""
    lr: float
    """Of the matrices."""
    tokens: int
    """Trained on, since the first step."""
    seconds: float
    """Wall time of the step, without validation."""
    skipped: int
    """Steps that changed nothing because something was not finite, since the first step."""


class Trainer:
    """A model, its optimizer and its place in the data.

    On CUDA the forward pass runs under bfloat16 autocast, elsewhere in float32. With torch.distributed, each rank makes
    one: every micro-batch is shared out among them.

    Args:
        model: takes ``input_ids`` [B, S] and returns an object with ``logits`` [B, S, V].
        settings: of the run.
        tokens: to train on; long enough for ``settings.ctx``.
        compiled: run through torch.compile, with the backend "ternary" for ternary layers.
        skip_nonfinite: go on after a loss or gradient that is not finite, without an update.

    Raises:
        ConfigError: if the ranks cannot share a micro-batch evenly.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, tokens: Tokens, *, compiled: bool, skip_nonfinite: bool
    ) -> None:
        self.model, self.settings, self.tokens = model, settings, tokens
        self.device = next(model.parameters()).device
        self.replicas = Replicas()
        settings.check_processes(self.replicas.size)
        self.optimizer = make_optimizer(model, settings, skip_nonfinite=skip_nonfinite)
        self.step = 0
        self._skip_nonfinite = skip_nonfinite
        self._skipped_losses = 0
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._validation = validation_windows(tokens.validation, settings.ctx, settings.batch)
        self._training_loss: Loss = next_token_loss
        self._validation_loss: Loss = next_token_loss
        if compiled:
            # The function, not its name: that is known of installed packages only.
            backend = "inductor" if settings.ternary is None else ternary
            # As CUDA graphs: a GPU runs the thousand kernels of a step faster than Python launches them.
            self._training_loss = torch.compile(next_token_loss, backend=backend, mode="reduce-overhead")
            self._validation_loss = torch.compile(next_token_loss, backend=backend)
        # A replay writes over the gradients of the one before, so they are added up here.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def lr(self) -> float:
        """Of the matrices, in the last step."""
        return float(self.optimizer.param_groups[-1]["lr"])

    @property
    def skipped(self) -> int:
        """Steps that changed nothing because something was not finite."""
        return self._skipped_losses + int(getattr(self.optimizer, "skipped_steps", 0))

    def train_step(self) -> float:
        """One step over all its micro-batches.

        Returns:
            The mean loss. If it is not finite, nothing was changed.

        Raises:
            NonFiniteError: for a loss, before its backward, or a gradient that is not finite, unless they are skipped.
        """
        settings = self.settings
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * settings.schedule(self.step)
        count = settings.batch * settings.accum
        total = 0.0
        for batch in windows(self.tokens.train, settings.ctx, count, settings.seed, self.step).split(settings.batch):
            torch.compiler.cudagraph_mark_step_begin()
            loss = self._loss(self._training_loss, batch.chunk(self.replicas.size)[self.replicas.rank])
            mean = loss.detach().clone()
            self.replicas.average([mean])
            value = mean.item()
            total += value / settings.accum
            if not math.isfinite(value):
                self._refuse(value)
                return total
            (loss / settings.accum).backward()
        self.replicas.average([p.grad for p in self.model.parameters() if p.grad is not None])
        try:
            self.optimizer.step()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step + 1}: {error}") from None
        self.optimizer.zero_grad(set_to_none=False)
        self.step += 1
        return total

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation windows, in nats a token."""
        self.model.eval()
        batches = self._validation[self.replicas.rank :: self.replicas.size]
        losses = [self._loss(self._validation_loss, batch) for batch in batches]
        self.model.train()
        # Ranks may have different numbers of batches, or none.
        total = torch.tensor([0.0, len(losses)], dtype=torch.float64, device=self.device)
        total[0] += sum(losses)
        self.replicas.average([total])
        return (total[0] / total[1]).item()

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, beside the settings and the tokens."""
        return {
            "step": self.step,
            "skipped_losses": self._skipped_losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            # The same on every rank.
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another trainer of the same model and settings was."""
        self.step, self._skipped_losses = state["step"], state["skipped_losses"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _loss(self, loss: Loss, batch: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return loss(self.model, batch.to(self.device))
        with torch.autocast("cuda", torch.bfloat16):
            return loss(self.model, batch.pin_memory().to(self.device, non_blocking=True))

    def _refuse(self, loss: float) -> None:
        if not self._skip_nonfinite:
            raise NonFiniteError(
                f"the loss of step {self.step + 1} is {loss}, the state is that of step {self.step}: lower the "
                "learning rate, or go on past such steps with --skip-nonfinite (skip_nonfinite=True)"
            )
        self.optimizer.zero_grad(set_to_none=False)
        self._skipped_losses += 1
        self.step += 1


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each window's next tokens, in nats.

    Args:
        model: as of `Trainer`.
        batch: int64 [B, ctx + 1].
    """
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def train(
    trainer: Trainer,
    *,
    checkpoint: Path,
    log: Path,
    save_every: int,
    eval_every: int,
    on_step: Callable[[StepRecord], None],
) -> bool:
    """Train to the last step, or to the first SIGINT or SIGTERM, which end the run after the step that they meet.

    Of several processes the first one writes and reports, and a signal to any of them ends the run.

    Args:
        trainer: a new one, or one that was loaded.
        checkpoint: written every ``save_every`` steps and at the end, but not after an error: it stays as it was.
        log: a `StepRecord` is appended as JSON after each step.
        save_every: steps.
        eval_every: steps between validations; the last step is always validated.
        on_step: called after each step.

    Returns:
        Whether the last step was reached.

    Raises:
        NonFiniteError: as of `Trainer.train_step`.
    """
    settings, replicas = trainer.settings, trainer.replicas
    first = replicas.rank == 0
    saved = trainer.step
    with (
        stop_signal(signal.SIGINT, signal.SIGTERM) as stop,
        named(log),
        log.open("a", encoding="utf-8") if first else contextlib.nullcontext() as lines,
    ):
        while trainer.step < settings.steps and not replicas.any(stop.is_set(), trainer.device):
            start = time.perf_counter()
            loss = trainer.train_step()
            seconds = time.perf_counter() - start
            due = trainer.step % eval_every == 0 or trainer.step == settings.steps
            record = StepRecord(
                step=trainer.step,
                loss=_finite(loss),
                validation=_finite(trainer.validate()) if due else None,
                lr=trainer.lr,
                tokens=trainer.step * settings.accum * settings.batch * settings.ctx,
                seconds=seconds,
                skipped=trainer.skipped,
            )
            if lines is None:
                continue
            lines.write(json.dumps(dataclasses.asdict(record)) + "\n")
            lines.flush()
            on_step(record)
            if trainer.step % save_every == 0 or trainer.step == settings.steps:
                save_checkpoint(checkpoint, trainer.state_dict())
                saved = trainer.step
        if first and saved != trainer.step:
            save_checkpoint(checkpoint, trainer.state_dict())
    return trainer.step == settings.steps


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor Inf."""
    return value if math.isfinite(value) else None
