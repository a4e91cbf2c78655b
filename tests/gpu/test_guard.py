"""The output guard on the TileLang kernels themselves, some of which are made to write Inf."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ternarize.errors import NonFiniteError
from ternarize.layer import TernaryLinear, ternary_layers
from tests.gpu.kit import HOPPER, FaultyExponents, compile_fresh, llama, random_tokens, relative_error, static_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="TileLang needs Hopper")]

FAULT = r"TileLang wrote NaN or Inf from finite input of shape \[.*\]: model\.layers\.0\.mlp\.up_proj \[512x256\]"


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FaultyExponents]:
    """Puts kernels that can be made to fail in the place of some layers' kernels."""
    from ternarize.backends.tilelang import linear as module

    def install(*layers: TernaryLinear) -> FaultyExponents:
        fault = FaultyExponents(module.linear, layers)
        monkeypatch.setattr(module, "linear", fault)
        return fault

    return install


def off_tilelang(model: torch.nn.Module) -> list[str]:
    return [name for name, layer in ternary_layers(model) if not layer.tilelang]


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (8, 200)], ids=str)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_auto_replaces_the_kernel_that_writes_inf(
    shape: tuple[int, int], cuda_graphs: bool, faulty: Callable[..., FaultyExponents]
) -> None:
    model: Any = llama(torch.bfloat16).eval()
    tokens = random_tokens(*shape)
    with torch.inference_mode():
        expected = compile_fresh(model, "torch")(tokens).logits
        fault = faulty(model.model.layers[0].mlp.up_proj)
        compiled = compile_fresh(model, cuda_graphs=cuda_graphs)
        # A CUDA graph is recorded by the second call.
        for _ in range(3):
            assert relative_error(compiled(tokens).logits, expected) < 2e-2
        assert not off_tilelang(model)
        fault.fail()
        with pytest.warns(RuntimeWarning, match=FAULT) as warned:
            logits = compiled(tokens).logits
        assert len(warned) == 1
        assert relative_error(logits, expected) < 2e-2
        for _ in range(3):
            assert relative_error(compiled(tokens).logits, expected) < 2e-2
    assert off_tilelang(model) == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_forced_tilelang_raises(cuda_graphs: bool, faulty: Callable[..., FaultyExponents]) -> None:
    model: Any = llama(torch.bfloat16).eval()
    fault = faulty(model.model.layers[0].mlp.up_proj)
    compiled = compile_fresh(model, "tilelang", cuda_graphs=cuda_graphs)
    with torch.inference_mode():
        for _ in range(3):
            compiled(random_tokens(2, 9))
        fault.fail()
        with pytest.raises(NonFiniteError, match=FAULT):
            compiled(random_tokens(2, 9))


def test_what_the_user_put_in_neither_warns_nor_switches() -> None:
    model: Any = llama(torch.bfloat16).eval()
    x = torch.randn(2, 9, 256, device="cuda", dtype=torch.bfloat16)
    x[1, 3] = torch.nan
    compiled = compile_fresh(model)
    with torch.inference_mode():
        logits = compiled(inputs_embeds=x).logits
    assert logits[0].isfinite().all()
    assert logits[1, 3:].isnan().all()
    assert not off_tilelang(model)


def test_decoding_with_a_cache_switches_at_a_later_step(faulty: Callable[..., FaultyExponents]) -> None:
    model: Any = llama(torch.bfloat16).eval()
    fault = faulty(model.model.layers[1].self_attn.k_proj)
    token = random_tokens(1, 1)
    cache = static_cache(model)
    torch._dynamo.reset()
    step: Any = torch.compile(model, backend="ternary", fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        model(token, past_key_values=cache, use_cache=True)
        for _ in range(4):
            step(token, past_key_values=cache, use_cache=True)
        # Flags that are still on their way are looked at in the next call, and those of the faulty one after that.
        torch.cuda.synchronize()
        fault.fail()
        step(token, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        with pytest.warns(RuntimeWarning, match=r"in an earlier call.*layers\.1\.self_attn\.k_proj"):
            step(token, past_key_values=cache, use_cache=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                step(token, past_key_values=cache, use_cache=True)
            cache.reset()
            model(token, past_key_values=cache, use_cache=True)
            for _ in range(4):
                logits = step(token, past_key_values=cache, use_cache=True).logits
    assert logits.isfinite().all()
    assert off_tilelang(model) == ["model.layers.1.self_attn.k_proj"]
