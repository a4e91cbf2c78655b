"""What the tests on a GPU share: a small Llama, its decoding, and a TileLang kernel that can be made to fail."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ternarize import TernaryConfig, ternarize
from ternarize.config import Kernels, Rule
from ternarize.layer import TernaryLinear

VOCABULARY = 512

#: Tokens that `decode` takes at once, and one by one.
PROMPT, STEPS = 7, 12

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def llama(dtype: torch.dtype, rule: Rule = "factored", device: str = "cuda") -> nn.Module:
    """Two blocks of ternary layers with random weights, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return ternarize(LlamaForCausalLM(config), TernaryConfig(rule=rule)).to(device=device, dtype=dtype)


def random_tokens(*shape: int, device: str = "cuda") -> Tensor:
    """int64 token ids, the same each time."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(device)


def compile_fresh(model: nn.Module, kernels: Kernels = "auto", *, cuda_graphs: bool = False) -> Any:
    """The model compiled with an empty Dynamo, with CUDA graphs as by mode="reduce-overhead": that takes no options."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"kernels": kernels, "triton.cudagraphs": cuda_graphs}
    return torch.compile(model, backend="ternary", fullgraph=True, options=options)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the 2-norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def static_cache(model: Any) -> StaticCache:
    """For 64 tokens; it never moves."""
    return StaticCache(config=model.config, max_cache_len=64)


def decode(model: nn.Module, step: Callable[..., Any], cache: StaticCache, tokens: Tensor) -> Tensor:
    """Logits after the prompt, run by `model`, and after each further token, run by `step`: [STEPS + 1, batch, ...]."""
    cache.reset()
    logits = [model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1]]
    for position in range(PROMPT, PROMPT + STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        out = step(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1].clone())
    return torch.stack(logits)


def check_one_graph_for_all_batches(model: nn.Module) -> None:
    """Compile for batches of any size, and see that this is done once."""
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = torch.compile(model, backend="ternary", fullgraph=True, dynamic=True)
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in (2, 5, 3, 16, 33):
            assert compiled(random_tokens(batch, 9, device=device.type)).logits.isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1


class FaultyExponents:
    """Stands between the op and the TileLang kernels, which then read other exponents than the op is given.

    They are copies, equal until `fail`, which makes them 127: x of ordinary size gives Inf. They never move, so that a
    recorded CUDA graph fails as well.

    Args:
        kernel: the host function `ternarize.backends.tilelang.linear.linear`.
        layers: those whose kernels will fail.
    """

    def __init__(self, kernel: Callable[..., list[Tensor]], layers: Sequence[TernaryLinear]) -> None:
        self._kernel = kernel
        self._exponents = {layer.E.data_ptr(): layer.E.detach().clone() for layer in layers}

    def __call__(
        self, x: Tensor, T_packed: Sequence[Tensor], E: Sequence[Tensor], *rest: Any, **fused: Any
    ) -> list[Tensor]:
        return self._kernel(x, T_packed, [self._exponents.get(e.data_ptr(), e) for e in E], *rest, **fused)

    def fail(self) -> None:
        """Fail from now on."""
        for exponents in self._exponents.values():
            exponents.fill_(127)
