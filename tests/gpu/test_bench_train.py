"""A training step of a small Llama as `ternarize bench train` runs it: right, timed on the device, memory counted."""

import pytest
import torch

from ternarize import TernaryConfig
from ternarize.bench.llama import SHAPES
from ternarize.bench.train_step import Contender, Task

pytestmark = pytest.mark.gpu

SMALL = SHAPES["1b"] | {
    # No factor of a layer: the gradient of the embedding is a float matrix.
    "vocab_size": 509,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("ternary", "bytes_a_weight"),
    [(None, 16.1), (TernaryConfig(), 3.4), (TernaryConfig(accumulator="int4"), 2.4)],
    ids=["dense", "int8", "int4"],
)
def test_a_training_step_is_right_and_timed_on_the_device(
    ternary: TernaryConfig | None, bytes_a_weight: float, checkpointing: bool
) -> None:
    torch._dynamo.reset()
    contender = Contender(
        Task(
            config=SMALL,
            ternary=ternary,
            kernels="auto",
            apply="step",
            batch=2,
            ctx=256,
            checkpointing=checkpointing,
            trace_memory=True,
            device=torch.device("cuda"),
        )
    )
    ready = contender.prepare()
    assert ready.fault == ""
    assert ready.cuda_graphs
    assert ready.kernels == ({} if ternary is None else {"triton": 3 * 7})
    # The gradients of the dense layers are what there must be none of.
    assert bool(ready.weight_sized_allocations) == (ternary is None)
    assert ready.bytes_a_weight <= bytes_a_weight
    for _ in range(2):
        stretch = contender.run()
        assert stretch.device_seconds == pytest.approx(sum(stretch.phases.values()))
        assert all(seconds > 0 for seconds in stretch.phases.values())
        assert torch.cuda.memory_allocated() <= 1.01 * ready.resident_bytes
    assert contender.peak_bytes() > ready.resident_bytes > 0
    assert contender.check() == ""
