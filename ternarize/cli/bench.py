"""``ternarize bench``: speed, checked against float64 first. Each sub-verb measures one thing."""

import argparse
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

from ternarize import ops
from ternarize.bench.ceilings import Ceilings, measure_ceilings
from ternarize.bench.linear import Op, Plan, Result, begin_kernels, dense_seconds, measure_shape
from ternarize.bench.roofline import check_picture, draw_roofline
from ternarize.calls import shape_of
from ternarize.cli import add_output_arguments, bench_model, bench_train
from ternarize.cli.arguments import (
    DTYPES,
    add_activation_argument,
    add_layer_arguments,
    names_of,
    positive_numbers,
    seconds,
)
from ternarize.cli.bench_rows import number
from ternarize.cli.machine import describe, versions
from ternarize.cli.output import Interrupted, Output, finite
from ternarize.config import TernaryConfig
from ternarize.errors import ConfigError
from ternarize.evaluate import default_device

HELP = "measure speed against dense PyTorch; a wrong result gets no time"

#: Projections of models of 8B and 70B, and of small models with odd sizes.
SHAPES = "4096x4096,14336x4096,4096x14336,28672x8192,8192x28672,5120x13824,1536x8960,2560x6912"

#: From here on the table shows TFLOP/s in place of GB/s: on Hopper a dense bfloat16 product turns from one bound to the
#: other at about 200 tokens. The JSON object has both.
MANY_TOKENS = 128

TOKENS = "1,4,16,64,256,1024,4096"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-parser for each thing to measure, whose default ``measure`` fills in a report, cell by cell."""
    what = parser.add_subparsers(required=True, metavar="WHAT")
    linear = _add_parser(what, "linear", "one ternary layer beside dense products, over shapes and tokens")
    linear.set_defaults(measure=_linear)
    linear.add_argument(
        "--op",
        choices=get_args(Op),
        default="linear",
        help="y = x W^T, the gradient of x, or one step of training of the weight (default linear)",
    )
    linear.add_argument(
        "--shapes", type=_shapes, default=SHAPES, metavar="NxK,...", help=f"out x in features (default {SHAPES})"
    )
    linear.add_argument(
        "--tokens", type=positive_numbers, default=TOKENS, metavar="M,...", help=f"rows of x (default {TOKENS})"
    )
    add_layer_arguments(linear)
    linear.add_argument(
        "--kernels",
        type=lambda text: names_of("kernels", text, ops.BACKENDS),
        default=",".join(ops.BACKENDS),
        metavar="NAME,...",
        help=f"ternary kernels to measure (default {','.join(ops.BACKENDS)})",
    )
    linear.add_argument(
        "--seconds-per-cell",
        type=seconds,
        default=0.5,
        metavar="S",
        help="of timing, for one shape and number of tokens, everything together (default 0.5)",
    )
    add_activation_argument(linear)
    linear.add_argument("--plot", type=Path, metavar="FILE", help="also draw a roofline picture, .png or .svg")
    add_output_arguments(linear)
    decode = _add_parser(what, "decode", "one token after the other: a whole ternary model beside a dense one")
    bench_model.add_arguments(decode, "decode")
    add_output_arguments(decode)
    prefill = _add_parser(what, "prefill", "whole prompts: a whole ternary model beside a dense one")
    bench_model.add_arguments(prefill, "prefill")
    add_output_arguments(prefill)
    train = _add_parser(what, "train", "training steps: a whole ternary model beside a dense one with AdamW")
    bench_train.add_arguments(train)
    add_output_arguments(train)


def _add_parser(what: Any, name: str, meaning: str) -> argparse.ArgumentParser:
    """A sub-parser that says what it is in the list of all and in its own help."""
    parser: argparse.ArgumentParser = what.add_parser(name, help=meaning, description=meaning)
    return parser


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the sub-verb; its report, and what it was measured on."""
    device = getattr(arguments, "device", None) or default_device()
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe(device),
        "versions": versions(),
    }
    found = [f"{name} {version}" for name, version in report["versions"].items() if version]
    output.console.print(
        f"{report['date']}, {report['device']['name']}, {', '.join(found)}", highlight=False, soft_wrap=True
    )
    report["cells"] = []
    try:
        arguments.measure(arguments, output, device, report)
    except KeyboardInterrupt:
        raise Interrupted(report) from None
    report["ok"] = all(row["status"] in ("ok", "not run") for row in report["cells"])
    return report


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(shape_of(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _linear(arguments: argparse.Namespace, output: Output, device: torch.device, report: dict[str, Any]) -> None:
    plan = Plan(
        tokens=arguments.tokens,
        config=TernaryConfig(group_size=arguments.group_size, planes=arguments.planes),
        dtype=DTYPES[arguments.dtype],
        kernels=arguments.kernels,
        op=arguments.op,
        activations=arguments.activation,
        device=device,
        seconds_per_cell=arguments.seconds_per_cell,
    )
    if plan.op != "linear" and plan.activations != ("float",):
        raise ConfigError(f"--activation int8 is of linear layers forward, not of --op {plan.op}: leave it out")
    if plan.op == "update" and plan.config.planes != 1:
        raise ConfigError(f"--op update with --planes {plan.config.planes}: only layers of one plane train")
    if arguments.plot is not None:
        check_picture(arguments.plot)
    report["command"] = command = _command(arguments)
    ceilings = measure_ceilings(plan)
    report["ceilings"] = {
        "gigabytes_per_second": {
            "read": ceilings.read_bytes_per_second / 1e9,
            "copy": ceilings.copy_bytes_per_second / 1e9,
        },
        "teraflops_per_second": {name: rate / 1e12 for name, rate in ceilings.flops_per_second.items()},
    }
    rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in ceilings.flops_per_second.items())
    output.console.print(
        f"{command}\nceilings: read {ceilings.read_bytes_per_second / 1e9:.4g} GB/s, "
        f"copy {ceilings.copy_bytes_per_second / 1e9:.4g} GB/s, {rates}",
        highlight=False,
        soft_wrap=True,
    )
    begin_kernels(arguments.shapes, plan)
    results = []
    for N, K in arguments.shapes:
        measured = []
        try:
            with output.steps_progress() as progress:
                task = progress.add_task(f"{N} x {K}", total=len(plan.tokens))
                for cell in measure_shape(N, K, plan):
                    measured.append(cell)
                    progress.advance(task)
        finally:
            # Of an interrupted shape, what there is.
            output.console.print(_table(N, K, measured, ceilings))
            for line in _reasons(measured):
                output.console.print(line, highlight=False, soft_wrap=True)
            results += [result for cell in measured for result in cell]
            report["cells"] += [_row(result, cell, ceilings) for cell in measured for result in cell]
    if arguments.plot is not None:
        title = f"{describe(device)['name']}, {arguments.dtype}, groups of {arguments.group_size}"
        draw_roofline(arguments.plot, results, ceilings, title)
        output.console.print(f"roofline: {arguments.plot}", highlight=False, soft_wrap=True)


def _command(arguments: argparse.Namespace) -> str:
    """The call with every default written out: it measures the same when defaults change."""
    shapes = ",".join(f"{N}x{K}" for N, K in arguments.shapes)
    return (
        f"ternarize bench linear --op {arguments.op} --shapes {shapes} --tokens {','.join(map(str, arguments.tokens))} "
        f"--group-size {arguments.group_size} --planes {arguments.planes} --dtype {arguments.dtype} "
        f"--kernels {','.join(arguments.kernels)} --activation {','.join(arguments.activation)} "
        f"--seconds-per-cell {arguments.seconds_per_cell:g}"
    )


def _row(result: Result, cell: list[Result], ceilings: Ceilings) -> dict[str, Any]:
    row: dict[str, Any] = {
        "out_features": result.out_features,
        "in_features": result.in_features,
        "tokens": result.tokens,
        "contender": result.contender,
        "status": result.status,
        "reason": result.reason,
        "relative_error": finite(result.error),
    }
    if result.seconds is None:
        return row
    dense, floor = dense_seconds(cell), ceilings.floor(result)
    return row | {
        "microseconds": result.seconds * 1e6,
        "spread": result.spread,
        "times_dense": None if dense is None else dense / result.seconds,
        "gigabytes_per_second": result.bytes / result.seconds / 1e9,
        "teraflops_per_second": result.flops / result.seconds / 1e12,
        "percent_of_floor": None if floor is None else 100 * floor / result.seconds,
    }


def _table(N: int, K: int, measured: list[list[Result]], ceilings: Ceilings) -> Table:
    table = Table(title=f"{N} x {K} (out x in features)")
    for name in ("tokens", "kernel", "µs", "x dense", "rate", "% floor", "error"):
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for cell in measured:
        for result in cell:
            row = _row(result, cell, ceilings)
            table.add_row(
                str(result.tokens),
                result.contender,
                number(row.get("microseconds"), "{:.1f}") or result.status,
                number(row.get("times_dense"), "{:.2f}"),
                _rate(row),
                number(row.get("percent_of_floor"), "{:.0f}"),
                number(result.error, "{:.1e}"),
            )
        table.add_section()
    return table


def _reasons(measured: list[list[Result]]) -> Iterator[str]:
    """A line for each reason that something has no time, with the tokens that it holds for."""
    tokens: dict[tuple[str, str, str], list[str]] = {}
    for cell in measured:
        for result in cell:
            if result.reason:
                tokens.setdefault((result.contender, result.status, result.reason), []).append(str(result.tokens))
    for (contender, status, reason), where in tokens.items():
        yield f"{contender}, {', '.join(where)} tokens: {status}: {reason}"


def _rate(row: dict[str, Any]) -> str:
    """Bytes a second of few tokens, whose time is reading the weight; arithmetic a second of many."""
    if "microseconds" not in row:
        return ""
    if row["tokens"] < MANY_TOKENS:
        return f"{row['gigabytes_per_second']:.0f} GB/s"
    return f"{row['teraflops_per_second']:.3g} TFLOP/s"
