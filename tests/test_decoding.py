"""Compiled decoding without a GPU: its graphs; tests/gpu/test_cuda_graphs.py has what they become on one."""

import torch

from tests.gpu.kit import (
    PROMPT,
    STEPS,
    check_one_graph_for_all_batches,
    compile_fresh,
    decode,
    llama,
    random_tokens,
    static_cache,
)


def test_sizes_of_a_batch_share_one_graph() -> None:
    check_one_graph_for_all_batches(llama(torch.float32, device="cpu").eval())


def test_a_step_with_a_static_cache_has_no_graph_break_and_is_as_without_a_cache() -> None:
    model = llama(torch.float32, device="cpu").eval()
    tokens = random_tokens(1, PROMPT + STEPS, device="cpu")
    with torch.inference_mode():
        logits = decode(model, compile_fresh(model), static_cache(model), tokens)
        expected = model(tokens).logits[:, PROMPT - 1 :]
    torch.testing.assert_close(logits.transpose(0, 1), expected, rtol=1e-3, atol=1e-4)
