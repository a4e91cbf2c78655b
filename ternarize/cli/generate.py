"""``ternarize generate``: text from a prompt."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ternarize.backends import ternary
from ternarize.cli.output import Output
from ternarize.evaluate import load
from ternarize.generate import generate

HELP = "continue a prompt with a model, ternary or dense"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", type=Path, help="a converted folder, a dense transformers folder, or a .gguf file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue or to answer")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most so many (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the tokenizer's chat template, if it has one (default)",
    )
    parser.add_argument("--compile", action="store_true", help='run through torch.compile(model, backend="ternary")')


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb."""
    model, tokenizer = load(arguments.model)
    if arguments.compile:
        # The function, not its name: that is known of installed packages only.
        model.compile(backend=ternary)
    result = generate(
        model,
        tokenizer,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        chat=arguments.chat,
    )
    output.console.print(result.text, highlight=False)
    output.console.print(f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s", style="dim")
    return {"model": str(arguments.model), "prompt": arguments.prompt, **dataclasses.asdict(result)}
