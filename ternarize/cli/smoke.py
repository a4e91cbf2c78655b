"""``ternarize smoke``: does it run here, how long does it take, and does it stay finite and on integers."""

import argparse
import dataclasses
from typing import Any, get_args

import torch
from rich.table import Table
from torch._dynamo.exc import BackendCompilerFailed

from ternarize.api import ternarize
from ternarize.cli.machine import describe, device_argument
from ternarize.cli.output import Output, finite
from ternarize.config import Kernels, TernaryConfig
from ternarize.errors import ConfigError, KernelError, cause_of
from ternarize.evaluate import default_device
from ternarize.smoke.measure import FloatState, Measurement, Timing, measure
from ternarize.smoke.model import VOCABULARY, SmokeModel

HELP = "run a small ternary model once: times, memory, finiteness"

NO_MOE = "not built in this release"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--device", type=device_argument, help="default: the first GPU, or the CPU")
    parser.add_argument("--ctx", type=int, default=128, help="tokens a window (default 128)")
    parser.add_argument("--batch", type=int, default=4, help="windows (default 4)")
    parser.add_argument("--backward", action="store_true", help="also backward and update")
    parser.add_argument("--no-vq", action="store_true", help="without the vector-quantised bottleneck")
    parser.add_argument("--no-graph", action="store_true", help="without the graph over the tokens")
    parser.add_argument("--no-moe", action="store_true", help=f"mixtures of experts are {NO_MOE}")
    parser.add_argument("--max-moe-iters", type=int, metavar="N", help="no effect: there are no experts yet")
    parser.add_argument(
        "--compare", action="store_true", help=f"each of the kernels {', '.join(get_args(Kernels))}, compiled"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help='run through torch.compile(model, backend="ternary") (default)',
    )


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb; "ok" is false if a loss is not finite or a ternary layer holds a float."""
    for name in ("ctx", "batch"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}: use at least 1")
    if arguments.compare and not arguments.compile:
        raise ConfigError("--compare chooses kernels for compiled graphs: drop --no-compile")
    device = arguments.device or default_device()
    torch.manual_seed(0)
    model = ternarize(
        SmokeModel(vq=not arguments.no_vq, graph=not arguments.no_graph), TernaryConfig(group_size=64)
    ).to(device)
    tokens = torch.randint(VOCABULARY, (arguments.batch, arguments.ctx + 1)).to(device)
    floats = FloatState.of(model)
    report = {
        "device": describe(device),
        "blocks": {"vq": not arguments.no_vq, "graph": not arguments.no_graph, "moe": NO_MOE},
        "float_state": dataclasses.asdict(floats),
    }
    output.console.print(
        f"{report['device']['name']}, {arguments.batch} x {arguments.ctx} tokens, moe: {NO_MOE}\n"
        f"trainable float parameters: {floats.trainable_parameters:,}; inside ternary layers: "
        f"{floats.in_ternary_parameters} float parameters, {floats.in_ternary_buffers} float buffers",
        highlight=False,
        soft_wrap=True,
    )
    policies: tuple[Kernels | None, ...] = get_args(Kernels) if arguments.compare else (None,)
    refused: dict[str, str] = {}
    measured: dict[str, Measurement] = {}
    for policy in policies:
        name = policy or ("compiled" if arguments.compile else "eager")
        try:
            measured[name] = measure(
                model, tokens, backward=arguments.backward, compiled=arguments.compile, kernels=policy
            )
        except (KernelError, BackendCompilerFailed) as error:
            cause = cause_of(error)
            if not arguments.compare or not isinstance(cause, KernelError):
                raise
            refused[name] = str(cause)
            output.console.print(str(cause), highlight=False, soft_wrap=True)
    output.console.print(_table(measured))
    integers_only = floats.in_ternary_parameters == floats.in_ternary_buffers == 0
    finite = all(measurement.finite for measurement in measured.values())
    runs = {name: _row(measurement) for name, measurement in measured.items()}
    return {"ok": integers_only and finite, **report, "runs": runs, "refused": refused}


def _table(measured: dict[str, Measurement]) -> Table:
    """A column for each choice of kernels."""
    table = Table("", *measured)
    rows = {name: list(_cells(measurement).values()) for name, measurement in measured.items()}
    for i, what in enumerate(_cells(next(iter(measured.values())))):
        table.add_row(what, *(cells[i] for cells in rows.values()))
    return table


def _cells(measured: Measurement) -> dict[str, str]:
    kernels = ", ".join(f"{kernel} x {count}" for kernel, count in measured.kernels.items())
    cells = {"layers run by": kernels or "kernels of eager mode", **_seconds("forward", measured.forward)}
    if measured.backward_update is not None:
        cells |= _seconds("backward and update", measured.backward_update)
    if measured.cuda_peak_bytes is not None:
        cells["CUDA peak"] = f"{measured.cuda_peak_bytes / 2**20:,.0f} MiB"
    return cells | {"loss": f"{measured.loss:.4f}, {'finite' if measured.finite else 'NOT FINITE'}"}


def _seconds(what: str, timing: Timing) -> dict[str, str]:
    return {f"{what}, cold": f"{timing.cold:.3f} s", f"{what}, warm": f"{timing.warm * 1e3:.2f} ms"}


def _row(measured: Measurement) -> dict[str, Any]:
    return {**dataclasses.asdict(measured), "loss": finite(measured.loss)}
