"""Programmatic dependent launch of Inductor's kernels beside TileLang's, on a GPU that has it."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import run_and_get_code

from ternarize import TernaryConfig, ternarize
from tests.gpu.kit import HOPPER, PROMPT, STEPS, compile_fresh, decode, llama, random_tokens, static_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="TileLang needs Hopper")]

#: Kernels in what Inductor wrote, each with its body; of several that are launched as one, each is a branch.
KERNEL = re.compile(r"^def triton_\w+\(.*\n((?:    .*\n|\n)*)", re.M)
BRANCH = re.compile(r"if pid [<%].*:\n")


class Chain(nn.Module):
    """Layers with small kernels between them, among them one that loads nothing and one that loads what is older."""

    def __init__(self, features: int = 512, layers: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = x
        constants = []
        for layer in self.layers:
            y = layer(torch.nn.functional.rms_norm(residual, residual.shape[-1:]))
            constants.append(torch.full_like(y, 2.0))
            residual = residual + y
        return residual, torch.cat(constants)


def compiled_chain(*, programmatic: bool | None) -> tuple[Any, Tensor]:
    model = ternarize(Chain(), TernaryConfig(group_size=128)).to("cuda", torch.bfloat16).eval()
    torch._dynamo.reset()
    options: dict[str, Any] = {"triton.cudagraphs": True}
    if programmatic is not None:
        options["triton.enable_pdl"] = programmatic
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 512, generator=generator).to("cuda", torch.bfloat16)
    return torch.compile(model, backend="ternary", fullgraph=True, options=options), x


@pytest.mark.parametrize("programmatic", [None, True, False])
def test_each_kernel_triggers_and_waits_before_any_access(programmatic: bool | None) -> None:
    model, x = compiled_chain(programmatic=programmatic)
    with torch.inference_mode():
        _, codes = run_and_get_code(model, x)
    kernels = KERNEL.findall("\n".join(codes))
    assert len(kernels) >= 2
    for kernel in itertools.chain.from_iterable(BRANCH.split(kernel)[1:] or [kernel] for kernel in kernels):
        both = [TritonKernel.GDC_LAUNCH, TritonKernel.GDC_WAIT]
        found = [line.strip() for line in kernel.splitlines() if "gdc_" in line]
        assert found == ([] if programmatic is False else both)
        before_any_access = re.split(r"tl\.(?:load|store|atomic)", kernel)[0]
        assert before_any_access.count("gdc_") == len(found)


def test_the_same_bits_as_without_it() -> None:
    with torch.inference_mode():
        plain, x = compiled_chain(programmatic=False)
        inputs = [x * scale for scale in (1.0, -3.0, 0.1)]
        expected = [[y.clone() for y in plain(x)] for x in inputs]
        programmatic, _ = compiled_chain(programmatic=None)
        for _ in range(300):
            for x, wanted in zip(inputs, expected, strict=True):
                torch.testing.assert_close([*programmatic(x)], wanted, rtol=0, atol=0)


def test_decoding_gives_the_same_bits_as_without_it() -> None:
    model = llama(torch.bfloat16).eval()
    tokens = random_tokens(2, PROMPT + STEPS)
    logits: list[Tensor] = []
    with torch.inference_mode():
        for programmatic in (False, True):
            compile_fresh(model)
            options: dict[str, Any] = {"triton.cudagraphs": True, "triton.enable_pdl": programmatic}
            step = torch.compile(model, backend="ternary", fullgraph=True, options=options)
            cache = static_cache(model)
            logits.extend(decode(model, step, cache, tokens) for _ in range(20))
    torch.testing.assert_close(logits, logits[:1] * len(logits), rtol=0, atol=0)
