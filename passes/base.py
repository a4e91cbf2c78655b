"""What every pass shares: how it runs, how it counts, how it tells Inductor's caches that it changed."""

import functools
import hashlib
import logging
import operator
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import fx

log = logging.getLogger(__name__)


class GraphPass(ABC):
    """One rewrite of a graph: preconditions first, one rewrite, a count.

    A pass keeps ``meta`` of what it replaces, creates no aliases between inputs and outputs, and changes nothing when
    it finds nothing. `README.md` beside this file states all invariants.
    """

    @abstractmethod
    def rewrite(self, graph: fx.Graph) -> int:
        """Change ``graph`` in place and return how many sites were changed."""

    def __call__(self, graph: fx.Graph) -> int:
        """Run the pass; lint the graph if it changed."""
        count = self.rewrite(graph)
        log.debug("%s: %d", type(self).__name__, count)
        if count:
            graph.lint()
        return count


@functools.cache
def source_hash() -> str:
    """A digest of the package's sources: part of the key under which Inductor caches what passes made."""
    package = Path(__file__).parents[1]
    roots = (
        [package] if package.name == "ternarize" else [package / name for name in ("ternarize", "passes", "backends")]
    )
    files = sorted(path for root in roots for path in root.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def calls(node: fx.Node, *packets: torch._ops.OpOverloadPacket) -> bool:
    """Whether a node calls one of these ops, as Dynamo writes it (the packet) or as AOTAutograd does (the overload)."""
    return node.op == "call_function" and any(node.target in (packet, packet.default) for packet in packets)


def bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order op of a Dynamo graph runs, such as the part of a model that is checkpointed."""
    owner = node.graph.owning_module
    if node.op != "call_function" or owner is None:
        return []
    held = [getattr(owner, str(given.target), None) for given in node.all_input_nodes if given.op == "get_attr"]
    return [body for body in held if isinstance(body, fx.GraphModule)]


_INPLACE_OPERATORS = {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name[1:]}__")
} | {operator.setitem, operator.delitem}


def mutates(node: fx.Node) -> bool:
    """Whether a node of a Dynamo graph may write to one of its arguments. Errs on the side of yes."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(mutates(inner) for body in bodies(node) for inner in body.graph.nodes)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return bool(node.target.default._schema.is_mutable)
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    # The operator module has and_, or_, not_ and is_, which are keywords without the underscore.
    inplace = name.endswith("_") and not name.endswith("__") and getattr(node.target, "__module__", "") != "_operator"
    return inplace or node.target in _INPLACE_OPERATORS or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


def copy_meta(node: fx.Node) -> dict[str, Any]:
    """The meta of a node for its replacement, less what belongs to its exact arguments.

    Inductor checks ``eager_input_vals`` against the arguments, which a replacement does not share.
    """
    return {key: value for key, value in node.meta.items() if key != "eager_input_vals"}
