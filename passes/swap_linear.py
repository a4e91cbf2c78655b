"""Linear layers that a graph calls as functions: put ternary ones in their place.

`find_linear_calls` and `swap_linear_calls` serve `ternarize`, on graph modules that hold their parameters;
`SwapLinearPass` serves the backend, on Dynamo graphs, where a ternary layer's weight may be used as a dense one.
"""

import dataclasses
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument

from ternarize.layer import TernaryLinear
from ternarize.passes.base import GraphPass, copy_meta
from ternarize.passes.base import calls as calls_op

_LINEAR = (torch.nn.functional.linear, torch.ops.aten.linear.default)


@dataclasses.dataclass(eq=False, kw_only=True)
class LinearCalls:
    """Calls of F.linear in one graph that read the same parameters."""

    graph_module: fx.GraphModule
    weight: str
    """Path of the weight parameter in `graph_module`."""
    bias: str | None
    """Path of the bias parameter, if there is one."""
    nodes: list[fx.Node]
    refusal: str | None
    """Why these calls cannot be swapped, or None if they can."""


def find_linear_calls(graph_module: fx.GraphModule) -> list[LinearCalls]:
    """Calls of ``F.linear`` and ``aten.linear`` whose weight is a parameter of the graph module.

    Calls of modules are left out: they name what they call, so it is enough to replace the module.

    Returns:
        One record for each pair of weight and bias, in the order of their first calls.
    """
    found: dict[tuple[str, object], LinearCalls] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in _LINEAR:
            continue
        arguments = _arguments(node)
        weight, bias = _parameter_path(graph_module, arguments["weight"]), arguments.get("bias")
        if weight is None or graph_module.get_parameter(weight).dim() != 2:
            continue
        bias_path = _parameter_path(graph_module, bias)
        refusal = "its bias is computed in the graph" if bias is not None and bias_path is None else None
        calls = found.setdefault(
            (weight, bias_path if refusal is None else node),
            LinearCalls(graph_module=graph_module, weight=weight, bias=bias_path, nodes=[], refusal=refusal),
        )
        calls.nodes.append(node)
    return list(found.values())


def otherwise_read(graph_module: fx.GraphModule) -> set[str]:
    """Paths of parameters that the graph reads for anything but the weight or bias of a linear call."""
    return {
        str(node.target)
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and any(not _only_as_parameter(user, node) for user in node.users)
    }


def swap_linear_calls(calls: LinearCalls, layer: TernaryLinear) -> None:
    """Replace linear calls by calls of a ternary layer, and drop the dense parameters that nothing reads any more.

    The layer is called where the graph module already holds it; else it is put beside the weight, as
    ``<weight>_ternary``.

        before   %w = get_attr[target=fc.weight];  %y = linear(%x, %w, %b)     "f32[s0, 64]"
        after    %y = call_module[target=fc.weight_ternary](%x)                "f32[s0, 64]"

    Metadata of the calls, ``meta["val"]`` included, passes to the new nodes.
    """
    graph_module, graph = calls.graph_module, calls.graph_module.graph
    target = next((name for name, module in graph_module.named_modules() if module is layer), None)
    if target is None:
        target = f"{calls.weight}_ternary"
        graph_module.add_submodule(target, layer)
    for node in calls.nodes:
        with graph.inserting_before(node):
            call = graph.call_module(target, (_arguments(node)["input"],))
        node.replace_all_uses_with(call, propagate_meta=True)
        graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in (calls.weight, calls.bias) and not node.users:
            graph.erase_node(node)
    still_read = {node.target for node in graph.find_nodes(op="get_attr")}
    for path in (calls.weight, calls.bias):
        if path is not None and path not in still_read:
            owner_path, _, name = path.rpartition(".")
            owner = graph_module.get_submodule(owner_path)
            # Tracing puts parameters that it reads into bare holders; any other module has use for its own.
            if owner is graph_module or type(owner) is nn.Module:
                owner._parameters.pop(name, None)
    graph.lint()
    graph_module.recompile()


def _arguments(node: fx.Node) -> dict[str, Argument]:
    return {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}


def _parameter_path(graph_module: fx.GraphModule, node: object) -> str | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    return str(node.target) if isinstance(getattr(graph_module.get_submodule(owner), name), nn.Parameter) else None


def _only_as_parameter(user: fx.Node, parameter: fx.Node) -> bool:
    """Whether ``user`` is a linear call that reads ``parameter`` as its weight or bias, and not as its input."""
    return user.op == "call_function" and user.target in _LINEAR and _arguments(user)["input"] is not parameter


class SwapLinearPass(GraphPass):
    """Call the ternary op where a model uses the weight of a ternary layer functionally.

    Runs on the Dynamo graph. Code that reads ``layer.weight`` gets the dense weight, formed for the occasion; used in
    F.linear it need not be:

        w: "f32[N, K]" = ternarize.dequantize(T_packed, E, None, K, 128, torch.float32)
        y: "f32[s0, N]" = linear(x, w, bias)

    becomes

        call = ternarize.linear(x, [T_packed], [E], [None], [None], [None], [], 128, "float", False)
        y: "f32[s0, N]" = getitem(call, 0) + bias

    The weight is used as a dense one would be, so x is not rounded, whatever the layer's own activation.

    Such a call has no status tensor, hence no output guard and no TileLang. Calls under autocast stay as they are:
    their result has another dtype than their input. Counts swapped calls.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Swap each F.linear whose weight is a dequantised one."""
        count = 0
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not torch._C._nn.linear:
                continue
            arguments = _arguments(node)
            x, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
            if not isinstance(weight, fx.Node) or not calls_op(weight, torch.ops.ternarize.dequantize):
                continue
            if _dtype(x) != _dtype(node):
                continue
            T_packed, E, E_mantissa, _, group_size, _ = weight.args
            with graph.inserting_before(node):
                call = graph.call_function(
                    torch.ops.ternarize.linear,
                    (x, [T_packed], [E], [E_mantissa], [None], [None], [], group_size, "float", False),
                )
                y = graph.call_function(operator.getitem, (call, 0))
                if bias is not None:
                    y = graph.call_function(operator.add, (y, bias))
            call.meta = copy_meta(node)
            call.meta["example_value"] = [node.meta.get("example_value")]
            y.meta = copy_meta(node)
            node.replace_all_uses_with(y)
            graph.erase_node(node)
            if not weight.users:
                graph.erase_node(weight)
            count += 1
        return count


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
