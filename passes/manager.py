"""The order of the passes, and how Inductor calls them.

1. On the Dynamo graph (`run_on_dynamo_graph`), before autograd and before any cache key is computed:
   `SwapLinearPass`, so that functional uses of a ternary weight are calls of `linear` too; `FuseSharedInputPass`, which
   must come before autograd for the backward to be merged as well; `GuardLossPass`, on the outputs as the user wrote
   them. Then, with the choices of kernels at hand, `GuardOutputPass`: the buffers that it adds become inputs of what
   AOTAutograd makes.
2. On the joint graph (`JointPasses`), before it is partitioned: `InsertUpdateHookPass`.
3. On each functional graph after autograd (`PostGradPasses`), before Inductor's own passes: `LowerTernaryPass`, after
   which no semantic op is left; then, in inference, `FuseDecodePass`, which needs to know what TileLang runs, and norms
   and gates as Inductor's decompositions write them, before Inductor fuses them into kernels of its own.

`JointPasses` and `PostGradPasses` have a ``uuid`` that names the package's sources and every setting that a choice
depends on, so that Inductor's caches stay valid and never serve a graph that was lowered for other kernels.
"""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from ternarize.backends.select import Phase, fingerprint
from ternarize.config import Kernels
from ternarize.passes.base import source_hash
from ternarize.passes.fuse_decode import FuseDecodePass
from ternarize.passes.fuse_shared_input import FuseSharedInputPass
from ternarize.passes.insert_finite_guard import GuardLossPass
from ternarize.passes.insert_update_hook import InsertUpdateHookPass
from ternarize.passes.lower_ternary import LowerTernaryPass
from ternarize.passes.swap_linear import SwapLinearPass


def run_on_dynamo_graph(graph_module: fx.GraphModule) -> None:
    """Run the passes that come before autograd."""
    # Activation checkpointing makes graphs of their own of what it covers. The loss is an output of the outermost.
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            SwapLinearPass()(module.graph)
            FuseSharedInputPass()(module.graph)
            module.recompile()
    GuardLossPass()(graph_module.graph)
    graph_module.recompile()


class JointPasses(CustomGraphPass):
    """What runs on the joint forward and backward graph."""

    def __call__(self, graph: fx.Graph) -> None:
        """Run the passes in order."""
        InsertUpdateHookPass()(graph)

    def uuid(self) -> Any:
        """Part of the cache key."""
        return ("ternarize-joint", source_hash())


class PostGradPasses(CustomGraphPass):
    """What runs on the inference, the forward and the backward graph.

    Args:
        phase: of the graph that is being compiled.
        policy: which kernels to use.
    """

    def __init__(self, phase: Phase, policy: Kernels) -> None:
        self._phase: Phase = phase
        self._policy: Kernels = policy

    def __call__(self, graph: fx.Graph) -> None:
        """Run the passes in order."""
        LowerTernaryPass(self._phase, self._policy)(graph)
        if self._phase == "inference":
            FuseDecodePass()(graph)

    def uuid(self) -> Any:
        """Part of the cache key."""
        return (
            "ternarize",
            source_hash(),
            torch.__version__,
            self._phase,
            self._policy,
            fingerprint(),
        )
