from pathlib import Path
from typing import Any

from ternarize.backends.triton import dense
from ternarize.bench.allocations import telling_ctx, weight_sized


def test_the_tokens_of_a_trace_share_no_factor_with_a_weight() -> None:
    assert telling_ctx(2048, [(8192, 2048), (512, 2048)]) == 2039
    # 13 and 11 divide a weight.
    assert telling_ctx(16, [(13, 4), (22, 4)]) == 7


def test_allocations_the_size_of_a_float_weight_are_found() -> None:
    allocated = [48 * 32 * 4, 48 * 32 * 4, 16 * 32 * 2, 48 * 32, 48 * 32 * 4 + 1]
    trace: list[dict[str, Any]] = [{"action": "alloc", "size": size} for size in allocated]
    trace += [{"action": "free_completed", "size": 48 * 32 * 2}, {"action": "segment_alloc", "size": 48 * 32 * 2}]
    # A strip of a larger layer.
    frames = [{"filename": "/src/ternarize/ops.py"}, {"filename": str(Path(dense.__file__))}]
    trace.append({"action": "alloc", "size": 16 * 32 * 2, "frames": frames})
    trace.append({"action": "alloc", "size": 16 * 32 * 4, "frames": frames[:1]})
    found = {"48x32 of 4 bytes": 2, "16x32 of 2 bytes": 1, "16x32 of 4 bytes": 1}
    assert weight_sized(trace, [(48, 32), (16, 32)]) == found
    assert weight_sized(trace, [(64, 32)]) == {}
