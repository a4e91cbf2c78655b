"""Put guards against NaN and Inf into graphs: on the loss in training, on what TileLang kernels write in inference."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import LocalSource
from torch.utils._pytree import tree_leaves

from ternarize import ops  # noqa: F401  # importing ops registers torch.ops.ternarize
from ternarize.backends.torch.update import NONFINITE_LOSS
from ternarize.passes.base import GraphPass, bodies, calls

#: Position of the status tensors in the arguments of the two ops, and of the flags that refuse a whole backward.
STATUS = {torch.ops.ternarize.linear: 6, torch.ops.ternarize.linear_train: 17}
REFUSE = {torch.ops.ternarize.linear_train: 18}


def layer_calls(graph: fx.Graph, positions: dict[Any, int] = STATUS) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Calls of ternary layers in a Dynamo graph, each with its status tensors as nodes of that graph.

    Calls in the bodies of higher-order ops, where activation checkpointing puts them, are found too.

    Args:
        graph: from Dynamo.
        positions: which ops count, and where in their arguments the list is that is wanted in place of the status.
    """
    for node in graph.nodes:
        for op, position in positions.items():
            if calls(node, op):
                yield node, list(node.args[position])
        for body in bodies(node):
            inputs = body.graph.find_nodes(op="placeholder")
            # Whatever else a higher-order op takes, the inputs of its bodies come last.
            given = dict(zip(inputs, tree_leaves(node.args)[-len(inputs) :], strict=False))
            for call, statuses in layer_calls(body.graph, positions):
                yield call, [given[status] for status in statuses]


class GuardLossPass(GraphPass):
    """Refuse the update of a step whose loss is not finite, even where its gradient is.

    Runs on the Dynamo graph. A scalar output that requires gradients is a loss:

        loss: "f32[]" = ...                                     return (loss, logits)

    becomes

        guarded: "f32[]" = ternarize.guard_loss(loss, status)   return (guarded, logits)

    The op returns its input; its backward raises the loss bit in the status of one layer, which is enough: the
    optimizer refuses a step for all. Layers that are updated inside backward have flags that refuse it for all of them,
    one a device: the bit is raised there, before any of them is read. A copy and not the loss itself is returned, so no
    alias is made. Graphs without a layer that trains stay as they are. Counts guarded losses.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Guard every scalar output that requires gradients."""
        trained = {op: position for op, position in STATUS.items() if op in REFUSE}
        statuses = [status for _, found in layer_calls(graph, trained) for status in found]
        # Each flag once.
        refusals = dict.fromkeys(refuse for _, found in layer_calls(graph, REFUSE) for refuse in found)
        flags = list(refusals) or statuses[:1]
        if not flags:
            return 0
        output = graph.output_node()
        losses = [node for node in output.all_input_nodes if _is_loss(node.meta.get("example_value"))]
        for loss in losses:
            guarded = loss
            for flag in flags:
                with graph.inserting_before(output):
                    guarded = graph.call_function(torch.ops.ternarize.guard_loss, (guarded, flag, NONFINITE_LOSS))
                guarded.meta = dict(loss.meta)
            output.replace_input_with(loss, guarded)
        return len(losses)


def _is_loss(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point() and value.requires_grad


class GuardOutputPass(GraphPass):
    """Decide which layers report output that is not finite, and where to: those that will run in TileLang.

    Runs on the Dynamo graph, last of all passes. In place of the status tensors of such layers come rows of one tensor,
    a buffer of the graph module, which CUDA graphs take to stay where it is: one read of it tells of every layer. The
    other calls get no status, so they are lowered to kernels that report nothing:

        linear   = ternarize.linear(x, [Tq, Tk], [Eq, Ek], ..., [status_q, status_k], 128, "float", True)
        linear_1 = ternarize.linear(y, [T], [E], ..., [status], 128, "float", True)

    becomes, if only the first will run in TileLang,

        flags    = get_attr[target=ternarize_flags_0];  row_0 = select(flags, 0, 0);  row_1 = select(flags, 0, 1)
        linear   = ternarize.linear(x, [Tq, Tk], [Eq, Ek], ..., [row_0, row_1], 128, "float", True)
        linear_1 = ternarize.linear(y, [T], [E], ..., [], 128, "float", True)

    After the pass `flags` holds the buffers, and `statuses` the nodes of the status tensors whose places their rows
    took, in the order of the graph. Counts guarded layers.

    Args:
        guarded: whether the layers of a call are guarded.
    """

    def __init__(self, guarded: Callable[[fx.Node], bool]) -> None:
        self._guarded = guarded
        #: int32 [guarded layers, 2], one for each device of the graph.
        self.flags: list[torch.Tensor] = []
        #: For each of `flags`, the placeholders of the status tensors that its rows stand for.
        self.statuses: list[list[fx.Node]] = []

    def rewrite(self, graph: fx.Graph) -> int:
        """Give guarded layers a row to write to, and the others nothing."""
        by_device: dict[torch.device, dict[fx.Node, None]] = {}
        for node, statuses in list(layer_calls(graph)):
            if not calls(node, torch.ops.ternarize.linear):
                continue
            if self._guarded(node):
                for status in statuses:
                    by_device.setdefault(status.meta["example_value"].device, {})[status] = None
            else:
                node.update_arg(STATUS[torch.ops.ternarize.linear], [])
        for device, found in by_device.items():
            self._add_flags(graph, device, list(found))
        return sum(map(len, by_device.values()))

    def _add_flags(self, graph: fx.Graph, device: torch.device, statuses: list[fx.Node]) -> None:
        # Made in inference mode, it could not be written to outside of it.
        with torch.inference_mode(False):
            flags = torch.zeros(len(statuses), 2, dtype=torch.int32, device=device)
        owner, name = graph.owning_module, f"ternarize_flags_{len(self.flags)}"
        assert owner is not None
        owner.register_buffer(name, flags)
        # Dynamo says of every tensor that it leaves in a module where it found it, and AOTAutograd asks for it.
        sources: Any = owner._param_name_to_source
        sources[name] = LocalSource(name)
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            node = graph.get_attr(name)
        fake = statuses[0].meta["example_value"].fake_mode.from_tensor(flags, static_shapes=True)
        node.meta["example_value"] = fake
        with graph.inserting_after(node):
            for i, status in enumerate(statuses):
                row = graph.call_function(torch.select, (node, 0, i))
                row.meta["example_value"] = fake[i]
                status.replace_all_uses_with(row)
        self.flags.append(flags)
        self.statuses.append(statuses)
