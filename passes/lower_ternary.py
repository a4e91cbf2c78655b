"""Replace semantic ops by the ops of the backend that runs them."""

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ternarize.activation import quantize_activation
from ternarize.backends.select import Choice, Phase, choose, facts_of
from ternarize.config import Kernels
from ternarize.errors import TernarizeError
from ternarize.ops import LINEAR_STEM, lowered, with_status
from ternarize.passes.base import GraphPass, calls, copy_meta
from ternarize.passes.insert_finite_guard import STATUS
from ternarize.passes.insert_update_hook import hook_of

#: Ops that become a call of the lowered op with a subset of their arguments; update hooks are lowered in place.
LOWERED = (torch.ops.ternarize.linear, torch.ops.ternarize.linear_train, torch.ops.ternarize.grad_input)

#: Update hooks that have kernels: `update_keep` has none.
_LOWERED_HOOKS = (torch.ops.ternarize.update_stage, torch.ops.ternarize.update_apply)

_SEMANTIC = (*LOWERED, *_LOWERED_HOOKS)


class LowerTernaryPass(GraphPass):
    """Choose a kernel for every ternary op and call it.

    Runs on the functional graph after autograd, right before Inductor's own passes, with the phase of the graph. The
    choice is made per node by `ternarize.backends.select` from fake tensors. Before and after, in an inference graph:

        linear   = ternarize.linear(x, [T], [E], [None], [None], [None], [row], 128, "float", True)
        linear_1 = ternarize.linear_tilelang(x, [T], [E], [None], [None], [None], [row], 128)

    Only TileLang's ops take the rows of flags that `GuardOutputPass` gave to guarded layers, and write to them.

    With activation "int8" the quantiser is written into the graph, where Inductor fuses it into what computes x; layers
    that share x, one call by now, share it:

        linear   = ternarize.linear(x, [T], [E], [None], [None], [None], [status], 128, "int8", True)

        abs_1    = aten.abs(x);  ...  q: "i8[s0, 4096]" = ...;  scale: "f32[s0, 1]" = ...
        linear_1 = ternarize.linear_int8_triton(q, scale, [T], [E], [None], [None], [None], 128, torch.bfloat16)

    or, for a few tokens on TileLang, is part of the call:

        linear_1 = ternarize.linear_tilelang(x, [T], [E], [None], [None], [None], [row], 128, rounds=True)

    ``linear_train`` becomes the same lowered op: its update is already in the backward graph, where ``grad_input`` and
    the update hook (inside its auto_functionalized_v2) are replaced likewise. A semantic op that is left over is an
    error. Counts lowered ops.
    """

    def __init__(self, phase: Phase, policy: Kernels) -> None:
        self._phase: Phase = phase
        self._policy: Kernels = policy

    def rewrite(self, graph: fx.Graph) -> int:
        """Lower every ternary op of the graph."""
        count = 0
        for node in list(graph.nodes):
            hook = hook_of(node)
            if hook in _LOWERED_HOOKS:
                self._lower_hook(node, hook)
            elif calls(node, *LOWERED):
                stem, args = lowered_arguments(node)
                choice = choose_node(node, self._phase, self._policy)
                kwargs: dict[str, Any] = {}
                with graph.inserting_before(node):
                    if choice.backend == "tilelang" and rounds_itself(node):
                        stem, kwargs = LINEAR_STEM["float"], {"rounds": True}
                    elif stem == LINEAR_STEM["int8"]:
                        x, *rest = args
                        args = (*_write_quantizer(graph, x), *rest, x.meta["val"].dtype)
                    args = with_status(stem, choice.backend, args, guarded_by(node))
                    call = graph.call_function(lowered(stem, choice.backend), args, kwargs)
                call.meta = copy_meta(node)
                node.replace_all_uses_with(call)
                graph.erase_node(node)
            else:
                continue
            count += 1
        left = [node.name for node in graph.nodes if calls(node, *_SEMANTIC)]
        if left:
            raise TernarizeError(f"ternary ops {', '.join(left)} were not lowered: please report this with the model")
        return count

    def _lower_hook(self, node: fx.Node, hook: Any) -> None:
        functionalised = node.target is torch.ops.higher_order.auto_functionalized_v2
        stem = hook.default._schema.name.removeprefix("ternarize::")
        names = [argument.name for argument in hook.default._schema.arguments]
        # Mutated arguments are replaced by indices into the bases: how many there are is all that a verifier needs.
        kwargs: dict[str, Any] = dict(node.kwargs)
        mutated = {name: [None] * kwargs.get(f"_{name}_length", 0) for name in names if name not in kwargs}
        args = [(kwargs | mutated)[name] for name in names] if functionalised else list(node.args)
        facts = facts_of(stem, [value_of(argument) for argument in args])
        choice = choose(stem, self._phase, facts, self._policy)
        op = lowered(stem, choice.backend)
        if functionalised:
            node.update_arg(0, op)
        else:
            node.target = op


def guarded_by(node: fx.Node) -> Any:
    """The rows of flags that `GuardOutputPass` gave to a call of `linear`; a training call has none."""
    return node.args[STATUS[torch.ops.ternarize.linear]] if calls(node, torch.ops.ternarize.linear) else []


def lowered_arguments(node: fx.Node) -> tuple[str, tuple[Any, ...]]:
    """Stem and arguments of the lowered op for a call of `linear`, `linear_train` or `grad_input`.

    Those of ``linear_int8`` are still to be quantised: they are the arguments of ``linear``.
    """
    if calls(node, torch.ops.ternarize.linear):
        *weights, _, group_size, activation, _ = node.args
        return LINEAR_STEM[str(activation)], (*weights, group_size)
    if calls(node, torch.ops.ternarize.linear_train):
        x, _, *weights = node.args[:7]
        group_size, activation, _, _ = node.args[-4:]
        return LINEAR_STEM[str(activation)], (x, *weights, group_size)
    return "grad_input", node.args


def _write_quantizer(graph: fx.Graph, x: fx.Node) -> tuple[Any, Any]:
    """Write `quantize_activation` of x into the graph, in the ops that Inductor lowers; q and scale."""
    # Inductor takes seconds to import: where this pass runs, it is there.
    from torch._inductor.decomposition import select_decomp_table

    traced = make_fx(quantize_activation, decomposition_table=select_decomp_table())(x.meta["val"])
    (placeholder,) = traced.graph.find_nodes(op="placeholder")
    q, scale = graph.graph_copy(traced.graph, {placeholder: x})  # type: ignore[misc]  # the outputs, as they were
    return q, scale


def rounds_itself(node: fx.Node) -> bool:
    """Whether a call that TileLang gets rounds x to int8 in its kernel; in training the rounded x is needed again."""
    stem, values = lowered_values(node)
    if stem != LINEAR_STEM["int8"] or not calls(node, torch.ops.ternarize.linear):
        return False
    # TileLang takes a second to import: where it runs a call, it is there.
    from ternarize.backends.tilelang.linear import rounds

    x, T_packed, _, E_mantissa, *_, group_size = values
    return rounds(x, T_packed, E_mantissa, group_size)


def choose_node(node: fx.Node, phase: Phase, policy: Kernels) -> Choice:
    """The kernel for a call of `linear`, `linear_train` or `grad_input`, in a Dynamo graph or a later one."""
    stem, values = lowered_values(node)
    tilelang = not calls(node, torch.ops.ternarize.linear) or bool(node.args[-1])
    return choose(stem, phase, facts_of(stem, values), policy, tilelang=tilelang)


def lowered_values(node: fx.Node) -> tuple[str, list[Any]]:
    """`lowered_arguments` with fake tensors in place of nodes."""
    stem, args = lowered_arguments(node)
    return stem, [value_of(argument) for argument in args]


def value_of(argument: Any) -> Any:
    """The fake tensors of an argument of a node."""
    if isinstance(argument, fx.Node):
        return argument.meta["val"] if "val" in argument.meta else argument.meta["example_value"]
    if isinstance(argument, list | tuple):
        return [value_of(item) for item in argument]
    return argument
