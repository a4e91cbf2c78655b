"""Train a small ternary language model over bytes from scratch, beside a dense twin of the same start and data.

The ternary model keeps trits, int8 accumulators and int8 momentum for its linear layers, updated by the `factored`
rule: no float master weights. The dense twin keeps float32 weights and AdamW state. Both take every step on the
same batch.

    python examples/train_byte_model.py --steps 200
"""

import argparse
import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ternarize

SHAKESPEARE = Path(__file__).parent / "data" / "shakespeare.txt"


@dataclasses.dataclass(frozen=True)
class Losses:
    """Cross-entropy in nats a byte."""

    first: float
    """Of the first training batch, before any step."""
    validation: float
    """On text that was not trained on, after the last step."""


def byte_model(hidden: int, layers: int, context: int) -> LlamaForCausalLM:
    """A Llama over the 256 bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(data: Tensor, context: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the data, int64 [batch, context], without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - context, (batch,), generator=generator)
        yield torch.stack([data[start : start + context] for start in starts])


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor, context: int, batch: int) -> float:
    """Mean loss over 4 fixed batches."""
    model.eval()
    source = batches(data, context, batch, seed=1)
    losses: list[float] = [model(input_ids=ids, labels=ids).loss.item() for ids in (next(source) for _ in range(4))]
    model.train()
    return sum(losses) / len(losses)


def train_twins(
    text: bytes, *, hidden: int = 128, layers: int = 4, context: int = 128, batch: int = 16, steps: int = 200
) -> dict[str, Losses]:
    """Train the ternary model and its dense twin, printing both losses; the last tenth of the text is for validation.

    Returns:
        Losses by name, "ternary" and "dense".
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)
    train, validation = data.split([len(data) - len(data) // 10, len(data) // 10])

    torch.manual_seed(0)
    dense = byte_model(hidden, layers, context).to(device)
    ternary = ternarize.ternarize(copy.deepcopy(dense), group_size=64)
    models: dict[str, nn.Module] = {"ternary": ternary, "dense": dense}
    optimizers = {
        "ternary": ternarize.build_optimizer(ternary, torch.optim.AdamW, lr=2e-3),
        "dense": torch.optim.AdamW(dense.parameters(), lr=2e-3),
    }

    def schedule(step: int) -> float:
        """Warm-up over the first tenth, then a cosine to 2 % of the peak."""
        warm_up = max(1, steps // 10)
        return min((step + 1) / warm_up, 0.51 + 0.49 * math.cos(math.pi * step / steps))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers.values()]
    first: dict[str, float] = {}
    for step, ids in zip(range(steps), batches(train, context, batch, seed=0), strict=False):
        losses = {}
        for name, model in models.items():
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name] = loss.item()
        for scheduler in schedulers:
            scheduler.step()
        first = first or losses
        if step % max(1, steps // 10) == 0:
            print(f"step {step:4}  ternary {losses['ternary']:.3f}  dense {losses['dense']:.3f} nats/byte", flush=True)
    return {
        name: Losses(first[name], validation_loss(model, validation, context, batch)) for name, model in models.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=SHAKESPEARE, help="what to learn (default: four plays)")
    parser.add_argument("--hidden", type=int, default=128, help="features, a multiple of 4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes a window")
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--steps", type=int, default=200)
    options = vars(parser.parse_args(argv))
    for name, losses in train_twins(options.pop("text").read_bytes(), **options).items():
        print(f"{name}: {losses.first:.3f} nats/byte at the start, {losses.validation:.3f} on unseen text")


if __name__ == "__main__":
    main()
