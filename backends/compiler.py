"""The torch.compile backend "ternary".

A graph goes through five hands: Dynamo traces it; our passes run on what Dynamo wrote; AOTAutograd splits it into
forward and backward, with our pass on the joint graph; our passes lower the ternary ops of each part to kernels; and
Inductor fuses and schedules everything else. `ternarize.passes.manager` states the order and the reasons.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ternarize import guard
from ternarize.backends.select import Phase
from ternarize.backends.torch.update import NONFINITE_OUTPUT
from ternarize.config import Kernels, kernels_policy
from ternarize.errors import ConfigError
from ternarize.passes.base import mutates
from ternarize.passes.insert_finite_guard import layer_calls
from ternarize.passes.lower_ternary import choose_node, lowered_values
from ternarize.passes.manager import JointPasses, PostGradPasses, checks_finite, run_on_dynamo_graph

Compiled = Callable[..., Any]


def compile_graph(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any]
) -> Compiled:
    """Compile a Dynamo graph; `ternarize.backends.ternary` documents the arguments."""
    # Inductor takes seconds to import: not before there is something to compile.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    policy = kernels_policy(options.get("kernels"))
    patches = _inductor_patches(mode, {key: value for key, value in options.items() if key != "kernels"})
    run_on_dynamo_graph(graph_module)
    phase: Phase = "training" if _needs_autograd(example_inputs) else "inference"
    guarded = _record_choices(graph_module, example_inputs, phase, policy)
    _start_kernels(graph_module, phase, policy)

    def compile_part(graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        part: Phase = "inference" if settings.get("is_inference") else "training"
        with config.patch(post_grad_custom_pre_pass=PostGradPasses(part, policy)):
            return compile_fx_inner(graph, inputs, **settings)

    # Given to compile_fx as well, so that the key of AOTAutograd's cache has them.
    patches["joint_custom_pre_pass"] = JointPasses()
    patches["post_grad_custom_pre_pass"] = PostGradPasses(phase, policy)
    original = copy.deepcopy(graph_module) if guarded else None
    compiled: Any = compile_fx(graph_module, list(example_inputs), inner_compile=compile_part, config_patches=patches)
    return compiled if original is None else _guard_outputs(compiled, original, guarded, policy)


def _inductor_patches(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from torch._inductor import config, list_mode_options

    modes = list_mode_options()
    if mode is not None and mode not in modes and mode != "default":
        raise ConfigError(f"mode={mode!r} is unknown: use one of default, {', '.join(modes)}")
    known = config.get_config_copy()
    named = {key.replace("-", "_"): value for key, value in options.items()}
    for key in named:
        if key not in known:
            raise ConfigError(f"option {key!r} is neither 'kernels' nor an option of Inductor (torch._inductor.config)")
    return {**(modes.get(mode, {}) if mode else {}), **named}


def _needs_autograd(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def _record_choices(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], phase: Phase, policy: Kernels
) -> list[int]:
    """Note on each layer which kernel its node will get, for `ternarize.explain`.

    Returns:
        Positions among the graph's inputs of the status tensors whose layers will run in guarded TileLang kernels.
    """
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    position = {node: index for index, node in enumerate(placeholders)}
    guarded = []
    for node, statuses in layer_calls(graph_module.graph):
        choice = choose_node(node, phase, policy)
        for status in statuses:
            index = position.get(status)
            layer = guard.layer_of(example_inputs[index]) if index is not None else None
            if layer is not None:
                layer.choices[phase] = (choice.backend, choice.reason)
            if index is not None and choice.backend == "tilelang" and phase == "inference" and checks_finite():
                guarded.append(index)
    return guarded


def _start_kernels(graph_module: fx.GraphModule, phase: Phase, policy: Kernels) -> None:
    """Have the TileLang kernels of all calls compiled side by side, while Inductor compiles the rest of the graph."""
    for node, _ in layer_calls(graph_module.graph):
        if choose_node(node, phase, policy).backend == "tilelang":
            # TileLang takes a second to import.
            from ternarize.backends.tilelang.linear import prepare

            _, (x, T_packed, _, E_mantissa, bias, _, group_size) = lowered_values(node)
            guarded = phase == "inference" and checks_finite()
            prepare(x, T_packed, E_mantissa, bias, group_size, guarded=guarded)


def _guard_outputs(compiled: Compiled, original: fx.GraphModule, guarded: list[int], policy: Kernels) -> Compiled:
    """Look at the status tensors after each call; if a kernel failed, run the call again without it.

    One read of a few flags for the whole graph. The second run interprets the graph as Dynamo wrote it, whose ops
    choose Triton or torch outside of compiled graphs; a graph that writes to its inputs, such as a KV cache, cannot
    be run twice.
    """
    repeatable = not any(mutates(node) for node in original.graph.nodes)

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        broken = guard.raised([args[index] for index in guarded], NONFINITE_OUTPUT)
        if not broken:
            return outputs
        shapes = [list(arg.shape) for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
        guard.take_off_tilelang(broken, forced=policy == "tilelang", shape=shapes[0] if shapes else [])
        return fx.Interpreter(original).run(*args) if repeatable else outputs

    return run
