"""What becomes a CUDA graph, and how many graphs there are."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ternarize.layer import ternary_layers
from tests.gpu.kit import (
    HOPPER,
    PROMPT,
    STEPS,
    check_one_graph_for_all_batches,
    compile_fresh,
    decode,
    llama,
    random_tokens,
    relative_error,
    static_cache,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernels", [pytest.param("auto", id="auto"), pytest.param("triton", id="triton")])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_decoding_is_one_cuda_graph(kernels: Any, batch: int) -> None:
    from torch._inductor.cudagraph_trees import get_manager

    model = llama(torch.bfloat16).eval()
    tokens = random_tokens(batch, PROMPT + STEPS)
    with torch.inference_mode():
        expected = decode(model, compile_fresh(model, "torch"), static_cache(model), tokens)
        counters.clear()
        step = torch.compile(model, backend="ternary", fullgraph=True, mode="reduce-overhead")
        if kernels != "auto":
            step = compile_fresh(model, kernels, cuda_graphs=True)
        cache = static_cache(model)
        # Warm-up, recording and replays; then the cache starts anew, at its old address.
        for _ in range(2):
            logits = decode(model, step, cache, tokens)
            for y, wanted in zip(logits, expected, strict=True):
                assert relative_error(y, wanted) < 2e-2
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None
    assert manager.roots
    wanted_kernel = "tilelang" if kernels == "auto" and HOPPER else "triton"
    assert {layer.choices["inference"][0] for _, layer in ternary_layers(model)} == {wanted_kernel}


def test_sizes_of_a_batch_share_one_graph() -> None:
    check_one_graph_for_all_batches(llama(torch.bfloat16).eval())
