"""Swap dense linear layers for ternary ones in graphs."""

import operator
from typing import Any

import torch
from torch import fx

from ternarize.passes.base import GraphPass, calls, copy_meta


class SwapLinearPass(GraphPass):
    """Call the ternary op where a model uses the weight of a ternary layer functionally.

    Runs on the Dynamo graph. Code that reads ``layer.weight`` gets the dense weight, formed for the occasion; used in
    F.linear it need not be:

        w: "f32[N, K]" = ternarize.dequantize(T_packed, E, None, K, 128, torch.float32)
        y: "f32[s0, N]" = linear(x, w, bias)

    becomes

        call = ternarize.linear(x, [T_packed], [E], [None], [None], [None], [], 128, False)
        y: "f32[s0, N]" = getitem(call, 0) + bias

    Such a call has no status tensor, hence no output guard and no TileLang. Calls under autocast stay as they are:
    their result has another dtype than their input. Counts swapped calls.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Swap each F.linear whose weight is a dequantised one."""
        count = 0
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not torch._C._nn.linear:
                continue
            x, weight, bias = _linear_arguments(node)
            if not isinstance(weight, fx.Node) or not calls(weight, torch.ops.ternarize.dequantize):
                continue
            if _dtype(x) != _dtype(node):
                continue
            T_packed, E, E_mantissa, _, group_size, _ = weight.args
            with graph.inserting_before(node):
                call = graph.call_function(
                    torch.ops.ternarize.linear,
                    (x, [T_packed], [E], [E_mantissa], [None], [None], [], group_size, False),
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


def _linear_arguments(node: fx.Node) -> tuple[Any, Any, Any]:
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None
