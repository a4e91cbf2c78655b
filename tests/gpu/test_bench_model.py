"""A decode step of a small Llama as `ternarize bench decode` runs it: one CUDA graph, and right."""

import pytest
import torch

from ternarize import TernaryConfig
from ternarize.bench.llama import SHAPES
from ternarize.bench.step import Contender, Task, Work

pytestmark = pytest.mark.gpu

SMALL = SHAPES["1b"] | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("work", ["decode", "prefill"])
@pytest.mark.parametrize("ternary", [None, TernaryConfig()], ids=["dense", "ternary"])
def test_a_step_is_one_cuda_graph(work: Work, ternary: TernaryConfig | None) -> None:
    torch._dynamo.reset()
    contender = Contender(
        Task(
            work=work,
            config=SMALL,
            ternary=ternary,
            kernels="auto",
            batch=2,
            prompt=64,
            new_tokens=8,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        )
    )
    ready = contender.prepare()
    assert ready.error <= ready.allowed_error
    assert ready.cuda_graph
    stretch = contender.run()
    assert stretch.device_seconds is not None
    assert 0 < stretch.device_seconds < 1
    assert contender.check() == ""
    assert contender.peak_bytes() >= ready.resident_bytes > 0
