"""``ternarize eval``: perplexity of a model on a text."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from ternarize import evaluate
from ternarize.backends import ternary
from ternarize.cli.arguments import read_text
from ternarize.cli.output import Output
from ternarize.errors import ConfigError

HELP = "measure the perplexity of a model, ternary or dense, on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="a converted folder, a dense transformers folder, or a .gguf file")
    parser.add_argument("--text", type=Path, help="UTF-8 text file (default: the prose sample that ternarize ships)")
    parser.add_argument(
        "--window",
        type=int,
        help=f"tokens a window; windows do not overlap (default {evaluate.WINDOW}, or as many as the model takes)",
    )
    parser.add_argument("--max-tokens", type=int, help="use only so many tokens from the start of the text")
    parser.add_argument("--compile", action="store_true", help='run through torch.compile(model, backend="ternary")')


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb."""
    if arguments.max_tokens is not None and arguments.max_tokens < 2:
        raise ConfigError(f"--max-tokens is {arguments.max_tokens}: perplexity needs at least 2")
    text = evaluate.sample_text() if arguments.text is None else read_text("--text", arguments.text)
    model, tokenizer = evaluate.load(arguments.model)
    if arguments.compile:
        # The function, not its name: that is known of installed packages only.
        model.compile(backend=ternary)
    result = evaluate.perplexity(model, tokenizer, text, window=arguments.window, max_tokens=arguments.max_tokens)
    table = Table("perplexity", "nats/token", "tokens", "tokens/s", title=f"{arguments.model}")
    table.add_row(
        f"{result.perplexity:.4g}", f"{result.nll:.4f}", f"{result.tokens:,}", f"{result.tokens_per_second:,.1f}"
    )
    output.console.print(table)
    return {"model": str(arguments.model), **dataclasses.asdict(result)}
