"""Which kernel runs each ternary layer of a compiled model, and why."""

import dataclasses
from collections import Counter

from rich.table import Table
from torch import nn

from ternarize.errors import ConversionError
from ternarize.layer import ternary_layers


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """The kernel of one layer in one kind of graph."""

    layer: str
    phase: str
    """'inference' or 'training'."""
    kernel: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: rows, and the layers that no compiled graph has run yet."""

    rows: tuple[KernelRow, ...]
    not_compiled: tuple[str, ...]

    def kernels(self, phase: str) -> dict[str, int]:
        """How many layers each kernel runs in one kind of graph."""
        return dict(Counter(row.kernel for row in self.rows if row.phase == phase))

    def __str__(self) -> str:
        lines = [f"{row.layer} ({row.phase}): {row.kernel}: {row.reason}" for row in self.rows]
        lines += [f"{name}: not compiled yet: call the compiled model once" for name in self.not_compiled]
        return "\n".join(lines)

    def __rich__(self) -> Table:
        table = Table("layer", "graph", "kernel", "reason", title="ternary kernels")
        for row in self.rows:
            table.add_row(row.layer, row.phase, row.kernel, row.reason)
        for name in self.not_compiled:
            table.add_row(name, "-", "-", "not compiled yet: call the compiled model once")
        return table


def explain(model: nn.Module) -> Explanation:
    """Tell which kernel each ternary layer got when its graph was lowered.

    Args:
        model: as returned by torch.compile, or the model that was given to it; called at least once.

    Raises:
        ConversionError: if the model has no ternary layer.
    """
    layers = {name.removeprefix("_orig_mod."): layer for name, layer in ternary_layers(model)}
    if not layers:
        raise ConversionError("the model has no ternary layer: call ternarize(model) before torch.compile")
    rows = tuple(
        KernelRow(name, phase, backend, reason)
        for name, layer in layers.items()
        for phase, (backend, reason) in layer.choices.items()
    )
    return Explanation(rows, tuple(name for name, layer in layers.items() if not layer.choices))
