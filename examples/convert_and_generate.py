"""Convert a checkpoint to the packed ternary format, load it and generate text.

python examples/convert_and_generate.py SmolLM2-135M-Instruct.Q4_1.gguf smollm2-ternary --prompt "Why is the sky blue?"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ternarize import TernaryConfig
from ternarize.checkpoint import convert
from ternarize.evaluate import load
from ternarize.generate import generate


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a transformers folder, a .gguf file or any other format")
    parser.add_argument("destination", type=Path, help="a new folder")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args(argv)

    # Three trit planes share one power of two: 27 levels a weight, enough to round a trained model without training.
    convert(options.source, options.destination, TernaryConfig(planes=3, group_size=64))
    model, tokenizer = load(options.destination)
    print(generate(model, tokenizer, options.prompt, max_new_tokens=options.max_new_tokens).text)


if __name__ == "__main__":
    main()
