"""Which allocations of a training step are as large as a float matrix of one of its ternary layers.

A step of integer training needs none: neither a dense weight nor its gradient. The allocator's history has bytes, not
shapes, so `telling_ctx` finds a number of tokens with which nothing but a matrix has the elements of one. Strips of
decoded weights, at most half of their layer, may have the bytes of a smaller one: they are told by who allocates them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Shape = tuple[int, int]

#: The module that decodes strips of weights.
STRIPS = "backends/triton/dense.py"

#: Of an element: float16 and bfloat16, float32, float64.
FLOAT_BYTES = (2, 4, 8)


def telling_ctx(ctx: int, shapes: Iterable[Shape]) -> int:
    """The largest prime up to ``ctx`` that divides no N · K: the elements of every activation are a multiple of it."""
    sizes = {N * K for N, K in shapes}
    for number in range(ctx, 1, -1):
        is_prime = all(number % factor for factor in range(2, math.isqrt(number) + 1))
        if is_prime and all(size % number for size in sizes):
            return number
    return ctx


def weight_sized(trace: Iterable[Mapping[str, Any]], shapes: Iterable[Shape]) -> dict[str, int]:
    """How many allocations of a trace have the bytes of a float [N, K] and are no strip, by what they may be.

    Args:
        trace: of one device, as in `torch.cuda.memory._snapshot`.
        shapes: of ternary layers.
    """
    sizes = {N * K * width: f"{N}x{K} of {width} bytes" for N, K in shapes for width in FLOAT_BYTES}
    found = Counter(
        sizes[event["size"]]
        for event in trace
        if event["action"] == "alloc" and event["size"] in sizes and not _is_strip(event)
    )
    return dict(found)


def _is_strip(event: Mapping[str, Any]) -> bool:
    return any(frame["filename"].endswith(STRIPS) for frame in event.get("frames", ()))


def allocation_trace(step: Callable[[], object]) -> list[Mapping[str, Any]]:
    """What the allocator of the current CUDA device did in a step, with the Python frames of each allocation."""
    memory: Any = torch.cuda.memory
    memory._record_memory_history(context="alloc", stacks="python")
    try:
        step()
        torch.cuda.synchronize()
        trace: list[Mapping[str, Any]] = memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        memory._record_memory_history(enabled=None)
    return trace
