"""A small transformers Llama, ternary and compiled, on a GPU: the fused kernels against the torch reference."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ternarize import TernaryConfig, build_optimizer, ternarize
from ternarize.config import Kernels, Rule
from ternarize.layer import ternary_layers

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

VOCABULARY = 512
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def _llama(dtype: torch.dtype, rule: Rule = "factored") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
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
    model = ternarize(transformers.LlamaForCausalLM(config), TernaryConfig(rule=rule))
    return model.to(device="cuda", dtype=dtype)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).cuda()


def _compile(model: nn.Module, kernels: Kernels) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="ternary", fullgraph=True, options={"kernels": kernels})


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "kernels",
    [pytest.param("tilelang", marks=pytest.mark.skipif(not HOPPER, reason="TileLang needs Hopper")), "triton"],
)
def test_inference_equals_the_torch_kernels(kernels: Kernels) -> None:
    model = _llama(torch.bfloat16).eval()
    batches = [_tokens(*shape) for shape in ((2, 45), (8, 200), (1, 1))]
    with torch.inference_mode():
        reference = _compile(model, "torch")
        expected = [reference(tokens).logits for tokens in batches]
        compiled = _compile(model, kernels)
        logits = [compiled(tokens).logits for tokens in batches]
    assert {layer.choices["inference"][0] for _, layer in ternary_layers(model)} == {kernels}
    for y, wanted in zip(logits, expected, strict=True):
        # Each of 14 layers rounds its output to bfloat16, some elements the other way: 14 errors of about 2^-9 add up.
        assert _relative_error(y, wanted) < 2e-2


@pytest.mark.skipif(not HOPPER, reason="TileLang needs Hopper")
def test_inference_takes_tilelang_by_itself_on_hopper() -> None:
    model = _llama(torch.bfloat16).eval()
    with torch.inference_mode():
        _compile(model, "auto")(_tokens(2, 45))
    assert {layer.choices["inference"][0] for _, layer in ternary_layers(model)} == {"tilelang"}


def _train(model: nn.Module, kernels: Kernels, steps: int) -> Tensor:
    """Train in place on one batch.

    Returns:
        float32 losses, [steps].
    """
    compiled = _compile(model.train(), kernels)
    optimizer = build_optimizer(model, torch.optim.AdamW, lr=1e-4)
    tokens = _tokens(8, 65)
    losses = []
    for _ in range(steps):
        logits = compiled(tokens[:, :-1]).logits.float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def _is_statistic(name: str) -> bool:
    return name.endswith(("row_log2", "col_log2"))


@pytest.mark.parametrize(
    ("rule", "dtype", "differing", "loss_error", "statistics_error"),
    [
        # An integer differs where its stochastic rounding, or the sign of a gradient near 0, falls between the two
        # backends' gradients, which is as rare as these are close: about 1e-5 apart in float32, 1e-2 in bfloat16, whose
        # activations are rounded at every layer. Statistics are logarithms in 1/256.
        ("factored", torch.float32, 1e-3, 1e-5, 1),
        ("sign", torch.float32, 1e-3, 1e-5, 1),
        ("factored", torch.bfloat16, 3e-2, 1e-2, 8),
    ],
    ids=["factored-float32", "sign-float32", "factored-bfloat16"],
)
def test_training_equals_the_torch_kernels(
    rule: Rule, dtype: torch.dtype, differing: float, loss_error: float, statistics_error: int
) -> None:
    model = _llama(dtype, rule)
    initial = copy.deepcopy(model.state_dict())
    expected_model = copy.deepcopy(model)
    # The first step of `factored` only fills the statistics; the second moves momentum and accumulators.
    expected_losses = _train(expected_model, "torch", steps=2)
    losses = _train(model, "triton", steps=2)
    assert {layer.choices["training"][0] for _, layer in ternary_layers(model)} == {"triton"}
    torch.testing.assert_close(losses, expected_losses, rtol=loss_error, atol=0)

    expected = expected_model.state_dict()
    names = [name for name, value in expected.items() if not value.is_floating_point()]
    assert any((expected[name] != initial[name]).any() for name in names if name.endswith("T_accum"))
    counts = {"T_packed": [0, 0], "T_accum": [0, 0], "T_momentum": [0, 0], "E": [0, 0], "E_accum": [0, 0]}
    for name in names:
        actual = model.state_dict()[name]
        if _is_statistic(name):
            assert (actual.int() - expected[name].int()).abs().max() <= statistics_error, name
            continue
        count = counts[name.rpartition(".")[2]]
        count[0] += int((actual != expected[name]).sum())
        count[1] += actual.numel()
    for name, (wrong, total) in counts.items():
        assert wrong <= differing * total, f"{wrong} of {total} elements of {name} differ"
