"""``ternarize convert``: a checkpoint, dense or ternary, to the packed format."""

import argparse
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

from ternarize.checkpoint import ConversionReport, convert
from ternarize.checkpoint.source import read_config
from ternarize.cli.arguments import read_text
from ternarize.cli.output import Output
from ternarize.config import Activation, Init, TernaryConfig
from ternarize.errors import CheckpointError

HELP = "convert a checkpoint to packed ternary weights"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Tokens of the sample text that show what one plane without training is worth.
SAMPLE_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", type=Path, metavar="SRC", help="folder, .safetensors, .pt, .pth, .bin or .gguf file")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write")
    parser.add_argument(
        "--planes",
        type=int,
        choices=(1, 2, 3),
        help="trit planes, 2 bits a weight each: 3 is usable as it is, 1 is a start for training (default 3, or 1 with "
        "--init exact)",
    )
    parser.add_argument(
        "--trainable",
        action="store_true",
        help="with --planes 1: also write the state that training starts from (training_state.safetensors)",
    )
    parser.add_argument(
        "--group-size", type=int, help="weights that share an exponent; -1 for whole rows (default 128)"
    )
    parser.add_argument(
        "--init",
        choices=get_args(Init),
        help="how the exponent of one plane is chosen; more planes always use least_squares (the default). exact: the "
        "weights are ternary already, -s, 0 and s in each group, and stay what they are",
    )
    parser.add_argument(
        "--activation",
        choices=get_args(Activation),
        help="how layers multiply their input: as it comes (the default), or rounded to int8 a token, for models "
        "trained so (BitNet)",
    )
    parser.add_argument(
        "--include", action="append", metavar="PAT", help="convert only layers whose names match (repeatable)"
    )
    parser.add_argument(
        "--exclude", action="append", metavar="PAT", help="keep layers dense whose names match (repeatable)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a weights file (default 5GB)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of what stays dense (default: as the source)")
    evaluation = parser.add_mutually_exclusive_group()
    evaluation.add_argument(
        "--eval",
        type=Path,
        metavar="TEXT_FILE",
        help="measure the perplexity of both models on this text (by default with --planes 1, on a shipped sample)",
    )
    evaluation.add_argument("--no-eval", action="store_true", help="do not measure perplexity")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb."""
    config = _config(arguments)
    text = None if arguments.eval is None else read_text("--eval", arguments.eval)
    report = _convert(arguments, config, output)
    _print(report, output)
    result = report.as_dict()
    rounded_to_trits = report.planes == 1 and report.mean_weight_error != 0
    if text is not None or (rounded_to_trits and not arguments.no_eval):
        result["perplexity"] = _perplexities(report, text, output)
    if report.rounded_ternary:
        output.warn("the weights were ternary already and have been rounded: --init exact keeps them, in one plane")
    elif rounded_to_trits:
        output.warn(
            f"one trit plane alone is not usable without training{_ratio(result)}: "
            "train this model, or convert with --planes 3"
        )
    return result


def _config(arguments: argparse.Namespace) -> TernaryConfig | None:
    """What the options ask for; without any, what suits the source."""
    options = ("planes", "group_size", "init", "activation")
    given = {name: getattr(arguments, name) for name in options if getattr(arguments, name) is not None}
    if not given:
        return None
    planes = 1 if given.get("init") == "exact" else 3
    return TernaryConfig(**{"planes": planes, "init": "least_squares", **given})


def _convert(arguments: argparse.Namespace, config: TernaryConfig | None, output: Output) -> ConversionReport:
    with output.bytes_progress() as progress:
        task = progress.add_task("opening", total=None)

        def advance(name: str, done: int, total: int) -> None:
            progress.update(task, description=name, completed=done, total=total)

        return convert(
            arguments.source,
            arguments.destination,
            config,
            include=arguments.include,
            exclude=arguments.exclude,
            max_shard_size=arguments.max_shard_size,
            dtype=DTYPES.get(arguments.dtype),
            trainable=arguments.trainable,
            force=arguments.force,
            progress=advance,
        )


def _print(report: ConversionReport, output: Output) -> None:
    kept = Counter(layer.reason for layer in report.kept)
    table = Table(title=f"{report.source} -> {report.destination}", show_header=False)
    table.add_row("source", report.source_format)
    table.add_row("linear layers known by", report.identified_by)
    table.add_row("layers converted", str(len(report.converted)))
    for reason, count in kept.most_common():
        table.add_row("kept dense", f"{count} ({reason})")
    change = f"{report.bytes_before:,} -> {report.bytes_after:,} (x{report.bytes_after / report.bytes_before:.3f})"
    table.add_row("bytes of tensors", change)
    table.add_row("bits a ternary weight", f"{report.bits_per_weight:.3f}")
    if report.mean_weight_error is not None:
        table.add_row("mean weight error |W-W'|²/|W|²", f"{report.mean_weight_error:.4f}")
    output.console.print(table)


def _perplexities(report: ConversionReport, text: str | None, output: Output) -> dict[str, Any]:
    """Perplexity of both models, or why it was not measured."""
    reason = _unmeasurable(Path(report.destination))
    if reason is None:
        try:
            measured = _measure(report, text)
        except CheckpointError as error:
            reason = str(error)
    if reason is not None:
        output.console.print(f"perplexity was not measured: {reason}", highlight=False, soft_wrap=True)
        return {"not_measured": reason}
    table = Table("", "perplexity", "tokens", title=None if text is None else "perplexity on the given text")
    table.add_row("source", f"{measured['source']:.4g}", f"{measured['tokens']:,}")
    table.add_row("converted", f"{measured['converted']:.4g}", f"{measured['tokens']:,}")
    output.console.print(table)
    return measured


def _unmeasurable(destination: Path) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'ternarize[transformers]'"
    config = read_config(destination) or {}
    architectures = config.get("architectures") or []
    if not any(str(name).endswith("ForCausalLM") or str(name).endswith("LMHeadModel") for name in architectures):
        return "the checkpoint is no causal language model that transformers knows"
    return None


def _measure(report: ConversionReport, text: str | None) -> dict[str, Any]:
    # Only here, because it is needed only when asked for.
    from ternarize import evaluate

    max_tokens = SAMPLE_TOKENS if text is None else None
    sample = evaluate.sample_text() if text is None else text
    results = {}
    for key, path in (("source", report.source), ("converted", report.destination)):
        model, tokenizer = evaluate.load(path)
        results[key] = evaluate.perplexity(model, tokenizer, sample, max_tokens=max_tokens)
    return {**{key: value.perplexity for key, value in results.items()}, "tokens": results["source"].tokens}


def _ratio(result: dict[str, Any]) -> str:
    measured = result.get("perplexity", {})
    if "source" not in measured:
        return ""
    return f" (perplexity {measured['source']:.4g} became {measured['converted']:.4g})"
