"""Merge ternary layers that read the same input into one call: q, k and v; gate and up."""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from ternarize.passes.base import GraphPass, calls, copy_meta, mutates


class FuseSharedInputPass(GraphPass):
    """One op for ternary layers that share x, so that x is read once and backward is one op as well.

    Runs on the Dynamo graph, before autograd: the backward of the merged call is then merged by construction. Before:

        q = ternarize.linear(x, [Tq], [Eq], [None], [None], [None], [sq], 128, "float", True);  getitem(q, 0)
        k = ternarize.linear(x, [Tk], [Ek], [None], [None], [None], [sk], 128, "float", True);  getitem(k, 0)

    After:

        qk = ternarize.linear(x, [Tq, Tk], [Eq, Ek], ..., [sq, sk], 128, "float", True)
        getitem(qk, 0);  getitem(qk, 1)

    The merged call stands where the first one stood. Calls stay apart when anything between them may write to a tensor,
    when an argument is computed in the graph rather than given to it, and when their scalar arguments, trit planes or
    mantissas differ: no one kernel runs all. Counts merged groups.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Merge each group of sibling calls."""
        # Positions of writes split the graph into stretches, inside which calls may be moved up and casts are alike.
        groups: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
        stretch = 0
        stretch_of: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if mutates(node):
                stretch += 1
            stretch_of[node] = stretch
            if calls(node, torch.ops.ternarize.linear, torch.ops.ternarize.linear_train) and _movable(node):
                scalars = tuple(a for a in node.args if isinstance(a, int | str))
                lengths = tuple(bool(a) for a in node.args if isinstance(a, list))
                key = (stretch, node.target, _source(node.args[0], stretch_of), scalars, lengths, *_kind(node))
                groups[key].append(node)
        merged = [group for group in groups.values() if len(group) > 1]
        for group in merged:
            _merge(graph, group)
        return len(merged)


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """Trit planes, and the dtype of a mantissa: the same for all layers of a call, or they would not be one."""
    # Both ops begin alike, but for the anchor of one; each list has one layer before it is merged.
    first = 2 if calls(node, torch.ops.ternarize.linear_train) else 1
    weights: Any = node.args[first : first + 3]
    (packed,), _, (mantissa,) = weights
    return packed.meta["example_value"].shape[:-2], None if mantissa is None else mantissa.meta["example_value"].dtype


def _movable(node: fx.Node) -> bool:
    """Whether all but x are inputs of the graph, so that the call may stand anywhere after x."""
    given = [a for argument in node.args[1:] for a in (argument if isinstance(argument, list) else [argument])]
    return all(a.op in ("placeholder", "get_attr") for a in given if isinstance(a, fx.Node))


def _source(x: Any, stretch_of: dict[fx.Node, int]) -> Any:
    """What x is for the comparison: autocast gives each layer its own x.to(dtype) of one tensor."""
    if isinstance(x, fx.Node) and x.op == "call_method" and x.target == "to" and not x.kwargs:
        return ("to", stretch_of[x], *x.args)
    return x


def _merge(graph: fx.Graph, group: list[fx.Node]) -> None:
    first = group[0]
    columns = zip(*(node.args for node in group), strict=True)
    args = [[a for part in column for a in part] if isinstance(column[0], list) else column[0] for column in columns]
    with graph.inserting_before(first):
        call = graph.call_function(first.target, tuple(args))  # type: ignore[arg-type]  # an op packet or overload
    call.meta = copy_meta(first)
    call.meta["example_value"] = [output for node in group for output in node.meta["example_value"]]
    for index, node in enumerate(group):
        for user in list(node.users):
            # The op returns a list, so every user takes an item; a single layer has item 0 only.
            with graph.inserting_after(call):
                item = graph.call_function(operator.getitem, (call, index))
            item.meta = dict(user.meta)
            user.replace_all_uses_with(item)
            graph.erase_node(user)
        graph.erase_node(node)
