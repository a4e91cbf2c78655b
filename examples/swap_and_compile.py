"""Make a transformers model ternary, compile it, run it and train it for a few steps.

python examples/swap_and_compile.py --hidden 256 --steps 5
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ternarize


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="features of the model, a multiple of 4")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="of training, on one random batch")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = ternarize.ternarize(LlamaForCausalLM(config), group_size=64)
    print(model.ternary_report)

    # Integer state for the linear layers, AdamW for what stays floating point: embeddings, norms, the output head.
    optimizer = ternarize.build_optimizer(model, torch.optim.AdamW, lr=1e-3)
    fast = torch.compile(model, backend="ternary", fullgraph=True)
    ids = torch.randint(config.vocab_size, (4, 64))

    for step in range(options.steps):
        loss = fast(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    model.eval()
    with torch.no_grad():
        logits = fast(input_ids=ids).logits
    print(f"inference: logits {list(logits.shape)}")
    print(ternarize.explain(model))


if __name__ == "__main__":
    main()
