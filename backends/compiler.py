"""The torch.compile backend "ternary".

A graph goes through five hands: Dynamo traces it; our passes run on what Dynamo wrote; AOTAutograd splits it into
forward and backward, with our pass on the joint graph; our passes lower the ternary ops of each part to kernels; and
Inductor fuses and schedules everything else. `ternarize.passes.manager` states the order and the reasons.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ternarize import guard
from ternarize.backends import programmatic_launch
from ternarize.backends.guarded import Compiled, GuardedGraph
from ternarize.backends.select import Phase
from ternarize.config import Kernels, flag, kernels_policy
from ternarize.errors import ConfigError
from ternarize.layer import TernaryLinear
from ternarize.ops import LINEAR_STEM
from ternarize.passes.base import calls
from ternarize.passes.insert_finite_guard import GuardOutputPass, layer_calls
from ternarize.passes.lower_ternary import (
    choose_node,
    guarded_by,
    lowered_arguments,
    lowered_values,
    rounds_itself,
)
from ternarize.passes.manager import JointPasses, PostGradPasses, run_on_dynamo_graph

Layers = dict[fx.Node, TernaryLinear]

#: Of Inductor's config, for graphs that decode: kernels that do not need each other's results, such as the rotary
#: embeddings of q and k and the writes to the cache, are launched as one. More tokens gain nothing, and pay in memory
#: for results that are ready long before they are used.
_COMBINED = {"combo_kernels": True, "combo_kernels_pointwise_only": True}


def compile_graph(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None, options: dict[str, Any]
) -> Compiled:
    """Compile a Dynamo graph; `ternarize.backends.ternary` documents the arguments."""
    # Inductor takes seconds to import: not before there is something to compile.
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.virtualized import V

    from ternarize.backends.row_reductions import RowReductions

    policy = kernels_policy(options.get("kernels"))
    patches = _inductor_patches(mode, {key: value for key, value in options.items() if key != "kernels"})
    run_on_dynamo_graph(graph_module)
    phase: Phase = "training" if _needs_autograd(example_inputs) else "inference"
    layers = _layers(graph_module, example_inputs)
    _record_choices(graph_module, layers, phase, policy)
    guarding = phase == "inference" and checks_finite()

    def is_tilelang(node: fx.Node) -> bool:
        return choose_node(node, phase, policy).backend == "tilelang"

    in_tilelang = [node for node, _ in layer_calls(graph_module.graph) if is_tilelang(node)]
    if phase == "inference" and in_tilelang:
        patches = programmatic_launch.PATCHES | (_COMBINED if all(map(_decodes, in_tilelang)) else {}) | patches
    guards = GuardOutputPass(lambda node: guarding and is_tilelang(node))
    guards(graph_module.graph)
    graph_module.recompile()
    _start_kernels(graph_module, is_tilelang)

    choices = RowReductions() if phase == "inference" and _quantizes(graph_module) else V.choices

    def compile_part(graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        part: Phase = "inference" if settings.get("is_inference") else "training"
        passes = config.patch(post_grad_custom_pre_pass=PostGradPasses(part, policy))
        with passes, programmatic_launch.protocol(), V.set_choices_handler(choices):
            return compile_fx_inner(graph, inputs, **settings)

    # Given to compile_fx as well, so that the key of AOTAutograd's cache has them.
    patches["joint_custom_pre_pass"] = JointPasses()
    patches["post_grad_custom_pre_pass"] = PostGradPasses(phase, policy)
    # A copy that reads the flags themselves, as the compiled graph does.
    original = copy.deepcopy(graph_module, {id(flags): flags for flags in guards.flags}) if guards.flags else None
    compiled: Any = compile_fx(graph_module, list(example_inputs), inner_compile=compile_part, config_patches=patches)
    if original is None:
        return compiled  # type: ignore[no-any-return]  # untyped
    guarded = [layers[status] for statuses in guards.statuses for status in statuses]
    return GuardedGraph(compiled, original, guards.flags, guarded, policy)


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


def _decodes(node: fx.Node) -> bool:
    """Whether a call has no more tokens than TileLang's program for a few takes; not if their number is symbolic."""
    from ternarize.backends.tilelang.linear_decode import MOST_TOKENS

    rows = math.prod(lowered_values(node)[1][0].shape[:-1])
    return isinstance(rows, int) and rows <= MOST_TOKENS


def _quantizes(graph_module: fx.GraphModule) -> bool:
    """Whether a call has int8 activations."""
    return any(lowered_arguments(node)[0] == LINEAR_STEM["int8"] for node, _ in layer_calls(graph_module.graph))


def _needs_autograd(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def checks_finite() -> bool:
    """Whether outputs of TileLang kernels are guarded: TERNARIZE_CHECK_FINITE, on by default."""
    return flag("TERNARIZE_CHECK_FINITE", "ARB_TILELANG_CHECK_FINITE", default=True)


def _record_choices(graph_module: fx.GraphModule, layers: Layers, phase: Phase, policy: Kernels) -> None:
    """Note on each layer which kernel its node will get, for `ternarize.explain`."""
    for node, statuses in layer_calls(graph_module.graph):
        choice = choose_node(node, phase, policy)
        reason = choice.reason
        if phase == "training" and choice.backend == "tilelang":
            reason += ", and so does the stage of its update; the rest of training has no TileLang kernels"
        for status in statuses:
            if status in layers:
                layers[status].choices[phase] = (choice.backend, reason)


def _start_kernels(graph_module: fx.GraphModule, is_tilelang: Callable[[fx.Node], bool]) -> None:
    """Have the TileLang kernels of all calls compiled side by side, while Inductor compiles the rest of the graph."""
    for node, _ in layer_calls(graph_module.graph):
        if is_tilelang(node):
            # TileLang takes a second to import.
            from ternarize.backends.tilelang.programs import prepare, prepare_update

            stem, values = lowered_values(node)
            x, T_packed, _, E_mantissa, bias, _, group_size = values
            guarded, rounds = bool(guarded_by(node)), rounds_itself(node)
            prepare(stem, x, T_packed, E_mantissa, bias, group_size, guarded=guarded, rounds=rounds)
            if calls(node, torch.ops.ternarize.linear_train):
                prepare_update(x.dtype)


def _layers(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Layers:
    """The layer of each input of the graph that is a status tensor."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    found = {
        node: guard.layer_of(value)
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, Tensor)
    }
    return {node: layer for node, layer in found.items() if layer is not None}
