"""The whole path on a real checkpoint: convert, load, compile, measure, generate; then train from scratch.

    python examples/demo.py .models/SmolLM2-135M-Instruct.Q4_1.gguf

Fails if the ternary model's perplexity is more than 1.3 times the dense one's, or if a graph breaks.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.utils import counters
from train_byte_model import SHAKESPEARE, train_twins

import ternarize
from ternarize.cli import main as command
from ternarize.evaluate import load, perplexity, sample_text
from ternarize.generate import generate
from ternarize.layer import ternary_layers

SOURCE = Path(".models/SmolLM2-135M-Instruct.Q4_1.gguf")
DESTINATION = Path(".models/smollm2-ternary")
PROMPT = "Explain in two sentences why the sky is blue."

#: Perplexity of three planes over that of the dense source: about 1.25 by rounding to nearest.
LARGEST_RATIO = 1.3

console = Console()


def convert(source: Path, destination: Path, *options: str) -> None:
    """Run ``ternarize convert``."""
    call = ["convert", str(source), str(destination), *options]
    console.print(f"[bold]$ ternarize {' '.join(call)}[/bold]", soft_wrap=True)
    if command(call) != 0:
        raise SystemExit(1)


def one_plane_perplexity(source: Path, *options: str) -> dict[str, float]:
    """What ``ternarize convert --planes 1`` measures, and warns about on standard error, before and after."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        if command(["convert", str(source), f"{folder}/out", "--planes", "1", "--json", *options]) != 0:
            raise SystemExit(1)
    perplexities: dict[str, float] = json.loads(printed.getvalue())["perplexity"]
    return perplexities


def weight_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Bytes of the parameters of some modules."""
    return sum(p.nbytes for name in names for p in model.get_submodule(name).parameters())


def file_bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0 if its claims hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=SOURCE)
    parser.add_argument("destination", nargs="?", type=Path, default=DESTINATION)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens a window of perplexity")
    parser.add_argument("--windows", type=int, default=4, help="how many of them")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--hidden", type=int, default=128, help="features of the byte model")
    options = parser.parse_args(argv)
    text, window, tokens = sample_text(), options.window, options.windows * options.window

    console.rule("convert")
    group = ("--group-size", str(options.group_size))
    one_plane = one_plane_perplexity(options.source, *group)
    convert(options.source, options.destination, "--planes", "3", *group, "--force")

    console.rule("dense")
    dense, tokenizer = load(options.source)
    dense_perplexity = perplexity(dense, tokenizer, text, window=window, max_tokens=tokens)
    dense_text = generate(dense, tokenizer, PROMPT, max_new_tokens=options.new_tokens)
    console.print(f"[bold]{PROMPT}[/bold]\n{dense_text.text}", highlight=False)

    console.rule("ternary, three planes, compiled")
    ternary, tokenizer = load(options.destination)
    counters.clear()
    ternary.compile(backend="ternary")
    # The first window, and the first tokens, pay for compilation: they are not timed.
    compilation = perplexity(ternary, tokenizer, text, window=window, max_tokens=window).seconds
    ternary_perplexity = perplexity(ternary, tokenizer, text, window=window, max_tokens=tokens)
    compilation += generate(ternary, tokenizer, PROMPT, max_new_tokens=3).seconds
    ternary_text = generate(ternary, tokenizer, PROMPT, max_new_tokens=options.new_tokens)
    console.print(f"[bold]{PROMPT}[/bold]\n{ternary_text.text}", highlight=False)
    breaks = sum(counters["graph_break"].values())
    kernels = ternarize.explain(ternary).kernels("inference")
    console.print(f"compiled in {compilation:.0f} s")

    console.rule("a byte model from scratch")
    losses = train_twins(SHAKESPEARE.read_bytes(), hidden=options.hidden, steps=options.steps)

    names = [name for name, _ in ternary_layers(ternary)]
    ratio = ternary_perplexity.perplexity / dense_perplexity.perplexity
    table = Table("", "dense", "ternary", title=f"{options.source.name} on {torch.get_num_threads()} CPU threads")
    table.add_row(
        "bytes, linear layers in memory", f"{weight_bytes(dense, names):,}", f"{weight_bytes(ternary, names):,}"
    )
    table.add_row("bytes, files", f"{file_bytes(options.source):,}", f"{file_bytes(options.destination):,}")
    table.add_row(
        f"perplexity, {ternary_perplexity.tokens:,} tokens",
        f"{dense_perplexity.perplexity:.2f}",
        f"{ternary_perplexity.perplexity:.2f} (x{ratio:.3f})",
    )
    table.add_row(
        f"perplexity, {one_plane['tokens']:,} tokens, one plane",
        f"{one_plane['source']:.2f}",
        f"{one_plane['converted']:.3g}",
    )
    for what, dense_run, ternary_run in (
        ("reading", dense_perplexity, ternary_perplexity),
        ("writing", dense_text, ternary_text),
    ):
        table.add_row(f"tokens/s, {what}", f"{dense_run.tokens_per_second:.1f}", f"{ternary_run.tokens_per_second:.1f}")
    table.add_row("graph breaks", "not compiled", str(breaks))
    table.add_row("kernels", "torch.nn.Linear", ", ".join(f"{name} x {count}" for name, count in kernels.items()))
    for what in ("first", "validation"):
        dense_loss, ternary_loss = (getattr(losses[name], what) for name in ("dense", "ternary"))
        label = "untrained" if what == "first" else f"after {options.steps} steps, unseen text"
        table.add_row(f"nats/byte {label}", f"{dense_loss:.3f}", f"{ternary_loss:.3f}")
    table.caption = "The source is as it came (GGUF: 4 to 8 bits a weight); convert keeps embeddings dense."
    console.print(table)
    return 0 if ratio <= LARGEST_RATIO and breaks == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
