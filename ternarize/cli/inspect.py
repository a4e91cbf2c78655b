"""``ternarize inspect``: what is in a checkpoint, and whether it is sound."""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from ternarize.checkpoint import PackedCheckpoint, open_checkpoint
from ternarize.checkpoint.source import Source
from ternarize.cli.output import Output
from ternarize.errors import CheckpointError
from ternarize.packing import ROW, row_strips, unpack

HELP = "show what is in a checkpoint, and check it"


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """What a packed layer holds."""

    name: str
    shape: tuple[int, int]
    planes: int
    group_size: int
    bits_per_weight: float
    trits: dict[str, int]
    """How many trits are -1, 0 and 1, over all planes."""
    exponents: tuple[int, int]
    """Smallest and largest E."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("path", type=Path, metavar="PATH", help="folder, .safetensors, .pt, .pth, .bin or .gguf file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb; "ok" is false in the result if a tensor is damaged."""
    source = open_checkpoint(arguments.path)
    result: dict[str, Any] = {
        "path": str(arguments.path),
        "format": source.format,
        "tensors": len(source.tensors),
        "bytes": sum(source.stored_bytes(name) for name in source.tensors),
    }
    table = Table(title=str(arguments.path), show_header=False)
    for key, value in result.items():
        if key != "path":
            table.add_row(key, f"{value:,}" if isinstance(value, int) else value)
    faults: list[str] = []
    if isinstance(source, PackedCheckpoint):
        layers, faults = _check(source)
        verified = len(source.checksums)
        checks = {
            "format_version": source.quantization["format_version"],
            "tensors_with_checksum": verified,
            "faults": faults,
        }
        result |= {
            "quantization_config": source.quantization,
            "layers": [dataclasses.asdict(layer) for layer in layers],
            "checks": checks,
        }
        for key, value in source.quantization.items():
            if key != "modules":
                table.add_row(key, str(value))
        table.add_row("checks", "; ".join(faults) or f"ok ({verified} of {len(source.tensors)} tensors have checksums)")
        output.console.print(table)
        output.console.print(_layer_table(layers))
    else:
        for dtype, count in Counter(info.dtype for info in source.tensors.values()).items():
            table.add_row(str(dtype).removeprefix("torch."), f"{count:,} tensors")
        output.console.print(table)
    if arguments.tensors:
        result["tensor_list"] = _tensor_list(source)
        output.console.print(_tensor_table(source))
    for fault in faults:
        output.warn(fault)
    return {"ok": not faults, **result}


def _check(source: PackedCheckpoint) -> tuple[list[LayerSummary], list[str]]:
    """Read every tensor once: the packed layers that are sound, and what is wrong with the others."""
    layers, faults = [], []
    for name in source.layers:
        try:
            layers.append(_summary(source, name))
        except CheckpointError as error:
            faults.append(str(error))
    summarised = {f"{name}.{kind}" for name in source.layers for kind in ("T_packed", "E")}
    for name in source.tensors.keys() - summarised:
        try:
            source.load(name)
        except CheckpointError as error:
            faults.append(str(error))
    try:
        training = source.training_state()
        if training is not None:
            for name in training.tensors:
                training.load(name)
    except CheckpointError as error:
        faults.append(str(error))
    return layers, faults


def _summary(source: PackedCheckpoint, name: str) -> LayerSummary:
    layer = source.layers[name]
    T_packed, E = source.load(f"{name}.T_packed"), source.load(f"{name}.E")
    group_size = ROW if layer.config.group_size >= layer.in_features else layer.config.group_size
    counts = dict.fromkeys((-1, 0, 1), 0)
    for strip in row_strips(layer.out_features, layer.in_features):
        T = unpack(T_packed[..., strip, :], layer.in_features, group_size)
        for trit in counts:
            counts[trit] += int(T.eq(trit).sum())
    return LayerSummary(
        name=name,
        shape=(layer.out_features, layer.in_features),
        planes=layer.config.planes,
        group_size=layer.config.group_size,
        bits_per_weight=layer.bits_per_weight,
        trits={str(trit): count for trit, count in counts.items()},
        exponents=(int(E.min()), int(E.max())),
    )


def _layer_table(layers: list[LayerSummary]) -> Table:
    table = Table("layer", "N x K", "planes", "group", "bits", "-1", "0", "+1", "E", title="ternary layers")
    for layer in layers:
        total = sum(layer.trits.values())
        low, high = layer.exponents
        table.add_row(
            layer.name,
            "{} x {}".format(*layer.shape),
            str(layer.planes),
            "row" if layer.group_size == ROW else str(layer.group_size),
            f"{layer.bits_per_weight:.3f}",
            *(f"{count / total:.1%}" for count in layer.trits.values()),
            f"{low} to {high}",
        )
    return table


def _tensor_list(source: Source) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "dtype": str(info.dtype).removeprefix("torch."),
            "shape": list(info.shape),
            "bytes": source.stored_bytes(name),
        }
        for name, info in source.tensors.items()
    ]


def _tensor_table(source: Source) -> Table:
    table = Table("tensor", "dtype", "shape", "bytes", title="tensors")
    for entry in _tensor_list(source):
        table.add_row(entry["name"], entry["dtype"], str(entry["shape"]), f"{entry['bytes']:,}")
    return table
