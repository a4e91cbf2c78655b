"""Make the integer updates of a training graph its hooks: once a backward, on the layers' own tensors."""

import torch
from torch import fx

from ternarize import ops  # noqa: F401  # importing ops registers torch.ops.ternarize
from ternarize.passes.base import GraphPass, calls

#: Position of the first and one past the last tensor list of `linear_train` that its backward mutates or reads fresh.
_STATE = slice(7, 20)

#: What the backward of a layer does with its gradient: one of these.
HOOKS = (torch.ops.ternarize.update_stage, torch.ops.ternarize.update_apply, torch.ops.ternarize.update_keep)


class InsertUpdateHookPass(GraphPass):
    """Tie every `linear_train` of a joint graph to the update hook that its backward runs.

    Runs on the joint forward and backward graph, before it is partitioned. Autograd has written one ``update_stage``
    (or ``update_apply``, ``update_keep``) for each ``linear_train`` that gets a gradient, functionalised:

        y       = ternarize.linear_train(x, anchor, [T], [E], ..., [stage], ..., [status], ..., 128, ..., "step")
        ...
        staged  = auto_functionalized_v2(ternarize.update_stage, grad_y=[g], x=x, ..., _all_bases=[stage, status])

    What remains is to say that the stage belongs to the step and not to the forward that first saw it: the stage,
    statistics and status tensors are marked so that saving them for backward does not record their version. Without
    the mark two forwards before two backwards raise "modified by an inplace operation", as would a layer used twice.
    T_packed and E stay checked: a commit between forward and backward is an error. A layer whose output gets no
    gradient, as behind detach(), has no hook. Counts hooks.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Mark the state of each `linear_train`."""
        hooks = 0
        for node in graph.nodes:
            if calls(node, torch.ops.ternarize.linear_train):
                for tensors in node.args[_STATE]:
                    for tensor in tensors:
                        tensor.meta["saved_tensor_with_no_vc_check"] = True
            elif hook_of(node) is not None:
                hooks += len(node.kwargs["grad_y"] if "grad_y" in node.kwargs else node.args[0])
        return hooks


def hook_of(node: fx.Node) -> torch._ops.OpOverloadPacket | None:
    """Which of `HOOKS` a node is, functionalised or not."""
    for hook in HOOKS:
        functionalised = node.op == "call_function" and node.target is torch.ops.higher_order.auto_functionalized_v2
        if (functionalised and node.args[0] is hook.default) or calls(node, hook):
            return hook
    return None
