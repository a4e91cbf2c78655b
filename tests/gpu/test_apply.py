"""The three modes of an update in compiled graphs on a GPU: equal to eager, and what they allocate."""

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import nn

from ternarize import TernaryConfig, TernaryLinear, build_optimizer
from ternarize.layer import Apply
from tests.optim_kit import changed, snapshot
from tests.test_compile_apply import Integers, batch

pytestmark = pytest.mark.gpu

every_mode = pytest.mark.parametrize("mode", get_args(Apply))

#: A bfloat16 tensor of N x K elements is larger than the 32 MiB that a kernel may take as workspace.
K, N, TOKENS = 4096, 8192, 256


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@every_mode
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_compiled_training_equals_eager(mode: Apply, cuda_graphs: bool) -> None:
    model = Integers().cuda()
    before, twin = snapshot(model), copy.deepcopy(model)
    options: dict[str, Any] = {"triton.cudagraphs": cuda_graphs}
    compiled: Any = torch.compile(twin, backend="ternary", fullgraph=True, options=options)
    ternary: dict[str, Any] = {"lr": 1.0, "threshold": 1, "exponent_threshold": 127, "apply": mode}
    optimizers = [build_optimizer(each, ternary=ternary) for each in (model, twin)]
    zero = torch.zeros((), device="cuda")
    for seed in range(6):
        for run, optimizer in zip((model, compiled), optimizers, strict=True):
            for part in range(2):
                torch.compiler.cudagraph_mark_step_begin()
                run(batch(2 * seed + part).cuda(), zero).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert changed(twin, model.state_dict()) == []
    assert {"left.T_packed", "right.T_packed", "last.T_packed"} <= set(changed(model, before))


class Pair(nn.Module):
    """Two layers of N x K weights around a float parameter."""

    def __init__(self) -> None:
        super().__init__()
        config = TernaryConfig()
        self.up = TernaryLinear(K, N, bias=False, config=config, device="cuda", dtype=torch.bfloat16)
        self.down = TernaryLinear(N, K, bias=False, config=config, device="cuda", dtype=torch.bfloat16)
        self.gain = nn.Parameter(torch.ones(N, device="cuda"))
        for layer in (self.up, self.down):
            layer.E.fill_(-5)
            # 1, -1, 1 and 1, or four zeros.
            layer.T_packed.copy_(torch.randint(2, layer.T_packed.shape, dtype=torch.uint8, device="cuda") * 0x5D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)) * self.gain.to(x.dtype))
        return (y - x).float().square().mean()


@every_mode
def test_no_allocation_of_a_training_step_is_a_float_tensor_of_the_size_of_a_weight(mode: Apply) -> None:
    model = Pair()
    compiled: Any = torch.compile(model, backend="ternary", fullgraph=True)
    optimizer = build_optimizer(model, lr=1e-3, fused=True, ternary={"apply": mode, "skip_nonfinite": True})
    x = torch.randn(TOKENS, K, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        compiled(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    # What compiling, tuning and the first state of AdamW take is not a step's.
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        step()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    traces = [entry for trace in snapshot["device_traces"] for entry in trace]
    sizes = [entry["size"] for entry in traces if entry["action"] == "alloc"]
    # The walk sees what a step allocates: its activations, at the least.
    assert max(sizes) >= TOKENS * N * x.element_size()
    # Half precision would take 2 bytes a weight; a stage, which "backward" and "hooks" make for one layer, takes 1.
    assert max(sizes) < 2 * N * K
    if mode == "step":
        assert max(sizes) <= 32 * 2**20
