"""A small transformers Llama, ternary and compiled, on a GPU: the fused kernels against the torch reference."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ternarize import build_optimizer
from ternarize.config import Kernels, Rule
from ternarize.layer import ternary_layers
from tests.gpu.kit import HOPPER, compile_fresh, llama, random_tokens, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "kernels",
    [pytest.param("tilelang", marks=pytest.mark.skipif(not HOPPER, reason="TileLang needs Hopper")), "triton"],
)
def test_inference_equals_the_torch_kernels(kernels: Kernels) -> None:
    model = llama(torch.bfloat16).eval()
    batches = [random_tokens(*shape) for shape in ((2, 45), (8, 200), (1, 1))]
    with torch.inference_mode():
        reference = compile_fresh(model, "torch")
        expected = [reference(tokens).logits for tokens in batches]
        compiled = compile_fresh(model, kernels)
        logits = [compiled(tokens).logits for tokens in batches]
    assert {layer.choices["inference"][0] for _, layer in ternary_layers(model)} == {kernels}
    for y, wanted in zip(logits, expected, strict=True):
        # Each of 14 layers rounds its output to bfloat16, some elements the other way: 14 errors of about 2^-9 add up.
        assert relative_error(y, wanted) < 2e-2


@pytest.mark.skipif(not HOPPER, reason="TileLang needs Hopper")
def test_inference_takes_tilelang_by_itself_on_hopper() -> None:
    model = llama(torch.bfloat16).eval()
    with torch.inference_mode():
        compile_fresh(model, "auto")(random_tokens(2, 45))
    assert {layer.choices["inference"][0] for _, layer in ternary_layers(model)} == {"tilelang"}


def _train(model: nn.Module, kernels: Kernels, steps: int) -> Tensor:
    """Train in place on one batch.

    Returns:
        float32 losses, [steps].
    """
    compiled = compile_fresh(model.train(), kernels)
    optimizer = build_optimizer(model, torch.optim.AdamW, lr=1e-4)
    tokens = random_tokens(8, 65)
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
    model = llama(dtype, rule)
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
