"""Put checks for NaN and Inf into graphs: on the loss in training, on the outputs of TileLang kernels in inference."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ternarize import ops  # noqa: F401  # importing ops registers torch.ops.ternarize
from ternarize.backends.torch.update import NONFINITE_LOSS, NONFINITE_OUTPUT
from ternarize.passes.base import GraphPass, bodies, calls

#: Position of the status tensors in the arguments of the two ops.
STATUS = {torch.ops.ternarize.linear: 6, torch.ops.ternarize.linear_train: 14}


def layer_calls(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Calls of ternary layers in a Dynamo graph, each with its status tensors as nodes of that graph.

    Calls in the bodies of higher-order ops, where activation checkpointing puts them, are found too.
    """
    for node in graph.nodes:
        for op, position in STATUS.items():
            if calls(node, op):
                yield node, list(node.args[position])
        for body in bodies(node):
            inputs = body.graph.find_nodes(op="placeholder")
            # Whatever else a higher-order op takes, the inputs of its bodies come last.
            given = dict(zip(inputs, tree_leaves(node.args)[-len(inputs) :], strict=False))
            for call, statuses in layer_calls(body.graph):
                yield call, [given[status] for status in statuses]


class GuardLossPass(GraphPass):
    """Refuse the update of a step whose loss is not finite, even where its gradient is.

    Runs on the Dynamo graph. A scalar output that requires gradients is a loss:

        loss: "f32[]" = ...                                     return (loss, logits)

    becomes

        guarded: "f32[]" = ternarize.guard_loss(loss, status)   return (guarded, logits)

    The op returns its input; its backward raises the loss bit in the status of one layer, which is enough: the
    optimizer refuses a step for all. A copy and not the loss itself is returned, so no alias is made. Graphs without a
    layer that trains stay as they are. Counts guarded losses.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Guard every scalar output that requires gradients."""
        trained = (found for call, found in layer_calls(graph) if calls(call, torch.ops.ternarize.linear_train))
        status, *_ = next(trained, (None,))
        if status is None:
            return 0
        output = graph.output_node()
        losses = [node for node in output.all_input_nodes if _is_loss(node.meta.get("example_value"))]
        for loss in losses:
            with graph.inserting_before(output):
                guarded = graph.call_function(torch.ops.ternarize.guard_loss, (loss, status, NONFINITE_LOSS))
            guarded.meta = dict(loss.meta)
            output.replace_input_with(loss, guarded)
        return len(losses)


def _is_loss(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point() and value.requires_grad


class GuardOutputPass(GraphPass):
    """Check what a TileLang kernel writes: non-finite output from finite input raises a bit of the layer's status.

    Runs on the inference graph after autograd, just before `LowerTernaryPass`, and guards the calls that will become
    TileLang kernels. After the items of such a call:

        y: "bf16[s0, 4096]" = getitem(linear, 0)
        check_finite = ternarize.check_finite(y, x, status, 1)

    The backend looks at the status tensors once after the whole graph has run. Counts guarded outputs.
    """

    def __init__(self, chosen_backend: Callable[[fx.Node], str]) -> None:
        self._chosen_backend = chosen_backend

    def rewrite(self, graph: fx.Graph) -> int:
        """Add a check after each output of a call that will run in TileLang."""
        count = 0
        for node in list(graph.nodes):
            if not calls(node, torch.ops.ternarize.linear) or self._chosen_backend(node) != "tilelang":
                continue
            x, statuses = node.args[0], node.args[STATUS[torch.ops.ternarize.linear]]
            for item in list(node.users):
                with graph.inserting_after(item):
                    check = graph.call_function(
                        torch.ops.ternarize.check_finite.default,
                        (item, x, statuses[item.args[1]], NONFINITE_OUTPUT),
                    )
                check.meta["val"] = None
                count += 1
        return count
