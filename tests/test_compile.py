"""torch.compile(model, backend="ternary") on a transformers model, as a user calls it."""

import copy
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from ternarize import TernaryConfig, build_optimizer, explain, ternarize
from ternarize.errors import ConfigError, ConversionError, KernelError
from ternarize.layer import ternary_layers


def llama() -> LlamaForCausalLM:
    """SmolLM2's class, tiny: grouped-query attention and tied embeddings as there."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def integers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_llama_trains_compiled_as_it_does_eagerly(dynamic: bool) -> None:
    model = ternarize(llama(), TernaryConfig(group_size=32))
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(twin, backend="ternary", fullgraph=True, dynamic=dynamic)
    optimizers = [build_optimizer(m, torch.optim.AdamW, lr=1e-3) for m in (model, twin)]
    for step in range(3):
        tokens = torch.randint(0, 64, (2 + step if dynamic else 2, 16))
        losses = []
        for run, optimizer in zip((model, compiled), optimizers, strict=True):
            loss = run(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0])
    eager, other = integers(model), integers(twin)
    # Sums are formed in another order, so that a stochastic rounding may fall on the other side of its number.
    changed = sum(int((eager[name] != other[name]).sum()) for name in eager)
    assert changed <= 1e-3 * sum(tensor.numel() for tensor in eager.values())
    assert any(int(layer.T_accum.count_nonzero()) for _, layer in ternary_layers(twin) if layer.T_accum is not None)
    model.eval()
    twin.eval()
    with torch.no_grad():
        logits = [run(input_ids=tokens).logits for run in (model, compiled)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert not counters["graph_break"]
    if dynamic:
        assert counters["stats"]["unique_graphs"] == 2, "one training graph, one inference graph, whatever the batch"


def test_a_process_that_never_imports_ternarize_finds_the_backend(tmp_path: pathlib.Path) -> None:
    model = ternarize(llama(), TernaryConfig(group_size=32))
    torch.save(model, tmp_path / "model.pt")
    script = """
        import sys, torch
        # Unpickling the layers imports what they are made of.
        model = torch.load(sys.argv[1], weights_only=False)
        optimizer = sys.modules["ternarize"].build_optimizer(model, torch.optim.SGD, lr=0.1)
        tokens = torch.randint(0, 64, (2, 16))
        compiled = torch.compile(model, backend="ternary", fullgraph=True)
        for _ in range(2):
            loss = compiled(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            eager, fast = (m.eval()(input_ids=tokens).logits for m in (model, compiled))
        torch.testing.assert_close(eager, fast, rtol=1e-4, atol=1e-4)
        print("graph breaks", len(torch._dynamo.utils.counters["graph_break"]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "graph breaks 0\n"


def test_explain_names_the_kernel_of_every_layer_and_why() -> None:
    model = ternarize(llama(), TernaryConfig(group_size=32))
    compiled: Any = torch.compile(model, backend="ternary")
    assert len(explain(compiled).not_compiled) == 14
    with torch.no_grad():
        compiled(input_ids=torch.zeros(1, 4, dtype=torch.int64))
    explanation = explain(compiled)
    assert explanation.kernels("inference") == {"torch": 14}
    assert explanation.rows[0].layer == "model.layers.0.self_attn.q_proj"
    assert "the tensors are on cpu" in explanation.rows[0].reason
    assert not explanation.not_compiled
    assert "q_proj (inference): torch" in str(explanation)
    with pytest.raises(ConversionError, match="call ternarize"):
        explain(nn.Linear(2, 2))


def compile_one_layer(**options: Any) -> None:
    model = ternarize(nn.Sequential(nn.Linear(32, 8)), trainable=False)
    with torch.no_grad():
        torch.compile(model, backend="ternary", **options)(torch.randn(2, 32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"options": {"kernels": "cuda"}}, ConfigError, "is 'cuda': use one of auto, tilelang, triton, torch"),
        ({"options": {"kernels": "tilelang"}}, KernelError, "kernels=tilelang cannot run linear"),
        ({"options": {"no_such_option": 1}}, ConfigError, "'no_such_option' is neither 'kernels' nor an option"),
        ({"mode": "fastest"}, ConfigError, "mode='fastest' is unknown: use one of default"),
    ],
)
def test_wrong_options_say_what_to_use(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message) as failure:
        compile_one_layer(**options)
    assert isinstance(failure.value.inner_exception, error)
    assert "\n" not in str(failure.value.inner_exception)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TERNARIZE_BACKEND": "tritn"}, "TERNARIZE_BACKEND is 'tritn': use one of auto, tilelang, triton, torch"),
        ({"ARB_TERNARY_BACKEND": "x"}, "ARB_TERNARY_BACKEND is 'x': use one of"),
        ({"TERNARIZE_BACKEND": "torch", "ARB_TERNARY_BACKEND": "auto"}, "mean the same and differ: unset one"),
        ({"TERNARIZE_CHECK_FINITE": "yes"}, "TERNARIZE_CHECK_FINITE is 'yes': use 0 or 1"),
        ({"ARB_TILELANG_CHECK_FINITE": "no"}, "ARB_TILELANG_CHECK_FINITE is 'no': use 0 or 1"),
    ],
)
def test_wrong_environment_variables_say_what_to_use(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendCompilerFailed, match=message):
        compile_one_layer()


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERNARIZE_BACKEND", "tilelang")
    compile_one_layer(options={"kernels": "torch"})


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_torch_compile_pass_through(mode: str) -> None:
    compile_one_layer(mode=mode)


def test_a_cached_graph_is_not_served_for_other_kernels(tmp_path: pathlib.Path) -> None:
    script = """
        import torch
        from torch import nn
        from torch._dynamo.utils import counters
        from ternarize import ternarize, explain
        torch.manual_seed(0)
        model = ternarize(nn.Sequential(nn.Linear(32, 8)), trainable=False)
        compiled = torch.compile(model, backend="ternary")
        with torch.no_grad():
            compiled(torch.randn(2, 32))
        print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0)
        print(explain(compiled).kernels("inference"))
    """

    def run(**environment: str) -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | environment,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout.split("\n")[:2]

    assert run() == ["False", "{'torch': 1}"]
    assert run() == ["True", "{'torch': 1}"]
    assert run(TERNARIZE_BACKEND="triton", TRITON_INTERPRET="1") == ["False", "{'triton': 1}"]


def test_activation_checkpointing_and_frozen_layers_train_as_eagerly() -> None:
    model: Any = ternarize(llama(), TernaryConfig(group_size=32))
    for name, layer in ternary_layers(model):
        if "layers.0" in name:
            layer.freeze()
    model.activation_checkpointing_enable({"use_reentrant": False})
    twin = copy.deepcopy(model)
    for m in (model, twin):
        build_optimizer(m, torch.optim.SGD, lr=0.1)
    compiled: Any = torch.compile(twin, backend="ternary", fullgraph=True)
    tokens = torch.randint(0, 64, (2, 16))
    runs: tuple[Any, Any] = (model, compiled)
    for run in runs:
        run(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for (name, a), (_, b) in zip(ternary_layers(model), ternary_layers(twin), strict=True):
        assert a.status.tolist() == b.status.tolist() == [0, int("layers.1" in name)]
        if a.stage_row is not None and b.stage_row is not None:
            torch.testing.assert_close(b.stage_row, a.stage_row)
