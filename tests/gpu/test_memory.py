"""One copy of the weights, packed, whatever runs on it."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ternarize import TernaryConfig, TernaryLinear, freeze
from ternarize.config import Accumulator
from ternarize.layer import ternary_layers

pytestmark = pytest.mark.gpu

K, N = 4096, 14336

#: 2 bits a plane, and 8 bits of exponent for 128 weights; status, anchor and the like are the tolerance.
BITS, TOLERANCE = 2.07, 1.01


class Layers(nn.Module):
    """Three pairs of layers, their outputs kept in range."""

    def __init__(self, planes: int, *, trainable: bool = False, accumulator: Accumulator = "int8") -> None:
        super().__init__()
        config = TernaryConfig(planes=planes, accumulator=accumulator)  # type: ignore[arg-type]  # 1, 2 or 3
        sizes = ((K, N), (N, K)) * 3
        self.layers = nn.ModuleList(
            TernaryLinear(k, n, bias=False, config=config, trainable=trainable, device="cuda", dtype=torch.bfloat16)
            for k, n in sizes
        )
        for _, layer in ternary_layers(self):
            # Four zeros, or 1, -1, 1 and 1.
            layer.T_packed.copy_(torch.randint(2, layer.T_packed.shape, dtype=torch.uint8, device="cuda") * 0x5D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            x = nn.functional.rms_norm(y, y.shape[-1:])
        return x


@pytest.fixture
def start() -> Iterator[int]:
    """Bytes that are allocated already."""
    torch._dynamo.reset()
    gc.collect()
    yield torch.cuda.memory_allocated()
    torch._dynamo.reset()


def bits_a_weight(start: int) -> float:
    gc.collect()
    return 8 * (torch.cuda.memory_allocated() - start) / (6 * N * K)


@pytest.mark.parametrize("planes", [1, 3])
def test_a_frozen_model_takes_its_packed_bytes_before_and_after_it_ran(start: int, planes: int) -> None:
    model = Layers(planes).eval()
    freeze(model)
    assert bits_a_weight(start) <= BITS * planes * TOLERANCE
    compiled = torch.compile(model, backend="ternary", fullgraph=True)
    with torch.inference_mode():
        for tokens in (1, 1, 512, 2048, 1):
            compiled(torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()
    assert bits_a_weight(start) <= BITS * planes * TOLERANCE


@pytest.mark.parametrize(("accumulator", "bits"), [("int8", 2 + 16 + 8), ("int4", 2 + 8 + 8)])
def test_freezing_gives_back_the_training_state(start: int, accumulator: Accumulator, bits: int) -> None:
    model = Layers(1, trainable=True, accumulator=accumulator)
    for _, layer in ternary_layers(model):
        layer.prepare_training()
    assert bits <= bits_a_weight(start) <= bits + 0.2
    freeze(model)
    assert bits_a_weight(start) <= BITS * TOLERANCE
