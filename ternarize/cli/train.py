"""``ternarize train``: a decoder language model from scratch, on integers or as one of the baselines."""

import argparse
import statistics
from pathlib import Path
from typing import Any, get_args

import torch

from ternarize.cli.machine import describe, device_argument
from ternarize.cli.output import Output
from ternarize.config import Accumulator
from ternarize.errors import ConfigError
from ternarize.evaluate import default_device, require_transformers
from ternarize.layer import ternary_layers
from ternarize.train.curves import draw_curves, read_log
from ternarize.train.determinism import deterministic_algorithms
from ternarize.train.loop import StepRecord, Trainer, train
from ternarize.train.model import builtin_config, read_model_config
from ternarize.train.processes import joined
from ternarize.train.run import RunFolder, Source, export, start
from ternarize.train.settings import TrainRule, TrainSettings

HELP = "train a decoder language model on text, from scratch; under torchrun by several processes"

_DEFAULTS = TrainSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="what to learn")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for all that the run makes")
    parser.add_argument(
        "--validation", type=Path, metavar="FILE", help="text to measure on (default: the last 5 %% of the tokens)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json (default: every byte is a token)"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", type=Path, metavar="CONFIG", help="config.json of a transformers causal LM (default: a Llama)"
    )
    model.add_argument("--hidden", type=int, default=768, help="features of the Llama (default 768)")
    model.add_argument("--layers", type=int, default=12, help="blocks of the Llama (default 12)")
    _add_settings(parser.add_argument_group("training"))
    running = parser.add_argument_group("running")
    running.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="checkpoints (default 500)")
    running.add_argument("--eval-every", type=int, default=100, metavar="STEPS", help="validations (default 100)")
    running.add_argument("--resume", action="store_true", help="continue the run in DIR from its last checkpoint")
    running.add_argument(
        "--skip-nonfinite", action="store_true", help="go on after a loss or gradient that is NaN or Inf"
    )
    running.add_argument("--device", type=device_argument, help="default: the first GPU, or the CPU")
    running.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help='run through torch.compile, ternary layers with backend="ternary" (default: on a GPU)',
    )
    running.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let torch use deterministic algorithms only, so that a resumed run is the same bit for bit (default)",
    )


def _add_settings(group: argparse._ArgumentGroup) -> None:
    def add(name: str, kind: type, meaning: str) -> None:
        default = getattr(_DEFAULTS, name)
        note = "" if default is None else f" (default {default})"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=meaning + note)

    group.add_argument(
        "--rule",
        choices=get_args(TrainRule),
        default=_DEFAULTS.rule,
        help="how the matrices learn: on integers, or for comparison dense (AdamW) or ste (straight-through, AdamW) "
        "(default factored)",
    )
    group.add_argument(
        "--accumulator",
        choices=get_args(Accumulator),
        default=_DEFAULTS.accumulator,
        help="of factored: 18 bits a weight in all, or 10 (default int8)",
    )
    add("group_size", int, "weights that share an exponent, -1 for whole rows")
    add("ctx", int, "tokens a window")
    add("batch", int, "windows of one forward and backward")
    add("accum", int, "micro-batches of --batch windows a step")
    add("steps", int, "updates of the weights")
    add("lr", float, "peak of the matrices (default: 20/254, int4 14/254, sign 1, dense 2e-3, ste 1.4e-3)")
    add("float_lr", float, "peak of all other parameters")
    add("warmup", int, "steps to the peaks, before the cosine to 2 %% of them")
    add("seed", int, "of weights, data order and stochastic rounding")


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb."""
    require_transformers()
    for name in ("save_every", "eval_every"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: use at least 1")
    source = Source(texts=tuple(arguments.text), validation=arguments.validation, tokenizer=arguments.tokenizer)
    folder = RunFolder(arguments.out)
    device = arguments.device or default_device()
    with deterministic_algorithms(arguments.deterministic), joined(device) as device:
        trainer = _start(arguments, folder, source, device)
        first = trainer.replicas.rank == 0
        if not first:
            output.silence()
        output.console.print(_introduction(trainer), highlight=False, soft_wrap=True)
        finished = _train(trainer, folder, arguments, output)
    if not first:
        return {}
    if trainer.skipped:
        output.warn(
            f"{trainer.skipped} of {trainer.step} steps changed nothing: something in them was not finite; "
            "lower the learning rate or look for the cause"
        )
    records = read_log(folder.log)
    _draw(records, folder, output)
    if not finished:
        output.warn(f"stopped after step {trainer.step}, which is saved: the same call with --resume goes on")
        raise KeyboardInterrupt
    export(trainer.model, source, folder.model)
    output.console.print(
        f"the model is in {folder.model}: ternarize generate {folder.model} --prompt ...",
        highlight=False,
        soft_wrap=True,
    )
    return _result(trainer, folder, records)


def _start(arguments: argparse.Namespace, folder: RunFolder, source: Source, device: torch.device) -> Trainer:
    settings = TrainSettings(**{name: getattr(arguments, name) for name in TrainSettings.__dataclass_fields__})

    def model_config(vocabulary: int) -> Any:
        if arguments.model is not None:
            return read_model_config(arguments.model, vocabulary=vocabulary)
        return builtin_config(hidden=arguments.hidden, layers=arguments.layers, ctx=settings.ctx, vocabulary=vocabulary)

    return start(
        folder,
        settings,
        source,
        model_config,
        device=device,
        compiled=device.type == "cuda" if arguments.compile is None else arguments.compile,
        skip_nonfinite=arguments.skip_nonfinite,
        resume=arguments.resume,
    )


def _introduction(trainer: Trainer) -> str:
    model, tokens = trainer.model, trainer.tokens
    ternary = sum(layer.in_features * layer.out_features for _, layer in ternary_layers(model))
    weights = f"{ternary:,} ternary weights and " if ternary else ""
    floats = sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())
    size = trainer.replicas.size
    device = describe(trainer.device)["name"]
    return (
        f"{type(model).__name__}, {weights}{floats:,} float parameters, rule {trainer.settings.rule}, on "
        f"{device if size == 1 else f'{size} of {device}'}; {len(tokens.train):,} tokens of text, "
        f"{len(tokens.validation):,} to measure on; step {trainer.step} of {trainer.settings.steps}"
    )


def _train(trainer: Trainer, folder: RunFolder, arguments: argparse.Namespace, output: Output) -> bool:
    with output.steps_progress() as progress:
        task = progress.add_task("compiling", total=trainer.settings.steps, completed=trainer.step)

        def show(record: StepRecord) -> None:
            loss = "not finite" if record.loss is None else f"{record.loss:.4f}"
            speed = trainer.settings.accum * trainer.settings.batch * trainer.settings.ctx / record.seconds
            progress.update(task, description=f"loss {loss}, {speed:,.0f} tokens/s", completed=record.step)
            if record.step % arguments.eval_every == 0 or record.step == trainer.settings.steps:
                validation = "not finite" if record.validation is None else f"{record.validation:.4f}"
                output.console.print(
                    f"step {record.step:>6}  loss {loss}  validation {validation}  lr {record.lr:.3g}  "
                    f"{speed:,.0f} tokens/s",
                    highlight=False,
                )

        return train(
            trainer,
            checkpoint=folder.checkpoint,
            log=folder.log,
            save_every=arguments.save_every,
            eval_every=arguments.eval_every,
            on_step=show,
        )


def _draw(records: list[dict[str, Any]], folder: RunFolder, output: Output) -> None:
    try:
        draw_curves({folder.path.name: records}, folder.curves)
    except ConfigError as error:
        output.warn(str(error))
    # The model is worth more than its picture.
    except OSError as error:
        output.warn(f"{folder.curves} was not drawn ({error.strerror}): make room and repeat the call with --resume")


def _result(trainer: Trainer, folder: RunFolder, records: list[dict[str, Any]]) -> dict[str, Any]:
    # The log of a finished run may be gone when it is resumed.
    last = records[-1] if records else {"loss": None, "validation": None}
    cuda = trainer.device.type == "cuda"
    # The median leaves out the steps that compile.
    seconds = statistics.median(record["seconds"] for record in records) if records else None
    return {
        "out": str(folder.path),
        "model": str(folder.model),
        "steps": trainer.step,
        "skipped": trainer.skipped,
        "loss": last["loss"],
        "validation": last["validation"],
        "seconds_per_step": seconds,
        "cuda_peak_bytes": torch.cuda.max_memory_allocated(trainer.device) if cuda else None,
    }
