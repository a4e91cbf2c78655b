"""How the contenders of `ternarize bench decode`, `prefill` and `train` are compiled."""

from typing import Any

import torch
from torch._dynamo.utils import counters

from ternarize.backends import ternary
from ternarize.config import Kernels


def compile_step(step: Any, kernels: Kernels | None, *, cuda_graphs: bool = True) -> Any:
    """Compile a step into one full graph, as by ``mode="reduce-overhead"``.

    Args:
        step: a function.
        kernels: of a ternary model; None for a dense one, which Inductor compiles.
        cuda_graphs: replay what was compiled, on a GPU.
    """
    options: dict[str, Any] = {"triton.cudagraphs": cuda_graphs}
    if kernels is None:
        return torch.compile(step, fullgraph=True, dynamic=False, options=options)
    # The function, not its name: that is known of installed packages only.
    return torch.compile(step, backend=ternary, fullgraph=True, dynamic=False, options=options | {"kernels": kernels})


def recorded_cuda_graphs() -> bool:
    """Whether CUDA graphs were recorded, and nothing was left out of them, since Dynamo's counters were cleared."""
    found = counters["inductor"]
    # Recording counts its inputs, even if there is none.
    return "cudagraph_recorded_non_static_inputs" in found and not found["cudagraph_skips"]
