"""The torch.compile backend "ternary" and the kernels that it lowers to.

Nothing but the backend lives here: the subpackage `torch` would hide PyTorch in this namespace.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if __name__ != "ternarize.backends":  # reached as top-level `backends` from the repository's root
    raise ImportError("import ternarize.backends, not backends")

if TYPE_CHECKING:
    from torch import fx


def ternary(
    graph_module: "fx.GraphModule",
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: what ``torch.compile(model, backend="ternary")`` calls.

    Undecorated on purpose: PyTorch registers the entry point's function itself and refuses a second registration.

    Args:
        graph_module: from Dynamo; changed in place.
        example_inputs: its inputs.
        mode: as of torch.compile, e.g. "reduce-overhead".
        options: of Inductor, and "kernels": auto, tilelang, triton or torch, which wins over TERNARIZE_BACKEND.

    Raises:
        ConfigError: for an unknown mode, option or kernel choice.
        KernelError: if a kernel is forced and cannot run a layer.
    """
    # The passes ask `select` beside this file for kernels: imported here they would be a circle.
    from ternarize.backends.compiler import compile_graph

    return compile_graph(graph_module, example_inputs, mode=mode, options=options or {})
