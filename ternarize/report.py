"""What became of each linear layer of a model: the record that `ternarize` leaves on it."""

import dataclasses
import io

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

ALREADY_TERNARY = "already ternary"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One linear layer. Weights that several layers share count in the first of them only."""

    name: str
    reason: str | None = None
    """Why the layer was left as it was; None if it was made ternary."""
    tied_to: str | None = None
    """The layer whose weights this one shares, if that comes first."""
    bytes_before: int
    """Of weight and bias."""
    bytes_after: int
    """Of weight and bias, as an inference checkpoint holds them."""
    bytes_training: int = 0
    """Of the integers that only training needs."""
    weight_error: float | None = None
    """|W - W'|² / |W|²; None where nothing was rounded or there is no data (meta device)."""


@dataclasses.dataclass(frozen=True)
class TernaryReport:
    """Every linear layer of a model. Prints as a table, also through rich."""

    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """Layers that were made ternary."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """Layers that were left as they were."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    @property
    def bytes_before(self) -> int:
        """Of all linear layers, dense."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Of all linear layers now, without training state."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def bytes_training(self) -> int:
        """Of the training state of all layers."""
        return sum(layer.bytes_training for layer in self.layers)

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self.swapped)} of {len(self.layers)} linear layers made ternary", show_footer=True)
        table.add_column("layer", "all", overflow="fold")
        table.add_column("before", decimal(self.bytes_before), justify="right")
        table.add_column("after", decimal(self.bytes_after), justify="right")
        table.add_column("training", decimal(self.bytes_training), justify="right")
        table.add_column("weight error", justify="right")
        table.add_column("note", overflow="fold")
        for layer in self.layers:
            table.add_row(
                layer.name or "(the model)",
                decimal(layer.bytes_before),
                decimal(layer.bytes_after),
                decimal(layer.bytes_training),
                "" if layer.weight_error is None else f"{layer.weight_error:.4f}",
                layer.reason or (f"tied to {layer.tied_to!r}" if layer.tied_to is not None else ""),
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None).print(self)
        return text.getvalue().rstrip()
