"""``ternarize prewarm``: compile the kernels of a model before its first call."""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from rich.table import Table

from ternarize.backends.tilelang import CAPABILITY, WITHOUT_NVCC, finds_nvcc
from ternarize.calls import Call, calls_of_folder, calls_of_shapes
from ternarize.cli.arguments import DTYPES, positive_number
from ternarize.cli.output import Output
from ternarize.config import Activation, TernaryConfig, kernels_policy
from ternarize.errors import ConfigError
from ternarize.prewarm import Built, PlannedCall, build_all, default_jobs, plan_call, warm_triton

if TYPE_CHECKING:
    from ternarize.backends.tilelang.build import Program

HELP = "compile the kernels of a model, or of some shapes, before its first call"

#: Token counts of "all": beyond, a call runs the kernel of the last.
MOST_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "target",
        metavar="MODEL_OR_SHAPES",
        help="a converted folder, a dense transformers folder (its weights are not read), or shapes as out x in "
        "features, 4096x4096,14336x4096+14336x4096, where + joins layers that share their input",
    )
    parser.add_argument(
        "--tokens",
        type=_tokens,
        default="all",
        metavar="M,...",
        help=f"rows of x to be ready for, as in 1-16,64,4096, or all, up to {MOST_TOKENS} (default all)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of x (default bfloat16)")
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="of shapes and dense folders: weights that share an exponent, -1 for whole rows (default 128)",
    )
    parser.add_argument(
        "--planes", type=int, choices=(1, 2, 3), default=1, help="of shapes and dense folders: trit planes (default 1)"
    )
    parser.add_argument(
        "--activation",
        choices=get_args(Activation),
        default="float",
        help="of shapes and dense folders: how layers take x (default float)",
    )
    parser.add_argument(
        "--jobs", type=positive_number, default=default_jobs(), help="kernels compiled at a time (default: one a CPU)"
    )
    parser.add_argument(
        "--tune", action="store_true", help="on a GPU: time other sizes of each kernel and keep what is faster"
    )


def run(arguments: argparse.Namespace, output: Output) -> dict[str, Any]:
    """Run the verb; not ok if a kernel cannot be built, or none for want of nvcc."""
    started = time.perf_counter()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # Without a GPU, kernels are built for Hopper.
    capability = torch.cuda.get_device_capability() if gpu is not None else CAPABILITY
    if arguments.tune and gpu is None:
        raise ConfigError("--tune measures kernels on a GPU, and there is none here: leave it out")
    dtype, policy = DTYPES[arguments.dtype], kernels_policy()
    calls = _calls(arguments)
    plan = functools.partial(plan_call, tokens=arguments.tokens, dtype=dtype, policy=policy, capability=capability)
    planned = [plan(call) for call in calls]
    tuned = None
    if arguments.tune and gpu is not None:
        tuned = _tune(planned, arguments, gpu, output)
        # The choice may be another now.
        planned = [plan(call) for call in calls]
    built = _build((program for each in planned for program in each.programs), arguments.jobs, output)
    triton = [each.call for each in planned if gpu is not None and each.choice.backend == "triton"]
    report = {
        "target": arguments.target,
        "gpu": gpu,
        "dtype": arguments.dtype,
        "calls": [_call_report(each) for each in planned],
        "compiled": sum(each.compiled for each in built),
        "cached": sum(not each.compiled and each.error is None for each in built),
        "failed": [{"program": repr(each.program), "error": each.error} for each in built if each.error is not None],
        "triton_runs": sum(warm_triton(call, arguments.tokens, dtype) for call in triton),
        "tuned": tuned,
        "seconds": time.perf_counter() - started,
        "missing": WITHOUT_NVCC if capability == CAPABILITY and not finds_nvcc() else None,
    }
    report["ok"] = not report["failed"] and report["missing"] is None
    _print(report, output)
    return report


def _calls(arguments: argparse.Namespace) -> list[Call]:
    config = TernaryConfig(planes=arguments.planes, group_size=arguments.group_size, activation=arguments.activation)
    if Path(arguments.target).exists():
        return calls_of_folder(Path(arguments.target), config)
    try:
        return calls_of_shapes(arguments.target, config)
    except ValueError as error:
        raise ConfigError(f"{arguments.target} is no folder, and as shapes: {error}") from None


def _tune(planned: list[PlannedCall], arguments: argparse.Namespace, gpu: str, output: Output) -> dict[str, Any]:
    """Time the tiles of every TileLang call; what gains goes into the user's table."""
    from ternarize.backends.tilelang.linear import choose_tile
    from ternarize.backends.tilelang.tune import tune_call, tuning_programs
    from ternarize.backends.tilelang.tuned import save

    # Calls that round x themselves have programs of their own after these, and keep the heuristic's tiles.
    tunable = [each for each in planned if each.programs]
    programs = {each.call: tuning_programs(next(iter(each.programs)), arguments.tokens) for each in tunable}
    _build(
        (program for of_call in programs.values() for of_tokens in of_call.values() for program in of_tokens),
        arguments.jobs,
        output,
    )
    results = []
    with output.steps_progress() as progress:
        task = progress.add_task("timing tiles", total=sum(map(len, programs.values())))
        for call, of_call in programs.items():
            for result in tune_call(call, of_call, torch.device("cuda")):
                results.append(result)
                progress.advance(task)
    gains = {result.key: result.tile for result in results if result.gains}
    file = save(gpu, gains) if gains else None
    # It has chosen without them.
    choose_tile.cache_clear()
    return {
        "file": None if file is None else str(file),
        "results": [{**dataclasses.asdict(result), "saved": result.gains} for result in results],
    }


def _build(wanted: "Iterable[Program]", jobs: int, output: Output) -> list[Built]:
    programs = list(dict.fromkeys(wanted))
    # One line of progress instead of two of TileLang's a kernel.
    os.environ.setdefault("TILELANG_PRINT_ON_COMPILATION", "0")
    built = []
    with output.steps_progress() as progress:
        task = progress.add_task("compiling kernels", total=len(programs))
        for each in build_all(programs, jobs) if programs else ():
            built.append(each)
            progress.advance(task)
    return built


def _call_report(planned: PlannedCall) -> dict[str, Any]:
    first = planned.call[0]
    return {
        "out_features": [layer.out_features for layer in planned.call],
        "in_features": first.in_features,
        "group_size": first.config.group_size,
        "planes": [layer.config.planes for layer in planned.call],
        "activation": first.config.activation,
        "backend": planned.choice.backend,
        "reason": planned.choice.reason,
        "kernels": [
            {
                "tokens": _ranges(tokens),
                "program": type(program.tile).__name__,
                "tile": dataclasses.asdict(program.tile),
            }
            for program, tokens in planned.programs.items()
        ],
    }


def _print(report: dict[str, Any], output: Output) -> None:
    where = report["gpu"] or "no GPU here, kernels for Hopper (sm_90a)"
    table = Table("out x in features", "backend", "kernels", "tokens", title=f"{report['target']}, {where}")
    for call in report["calls"]:
        shape = "+".join(map(str, call["out_features"])) + f" x {call['in_features']}"
        kernels = call["kernels"]
        table.add_row(
            shape,
            call["backend"],
            str(len(kernels)) if kernels else "-",
            "; ".join(kernel["tokens"] for kernel in kernels) or call["reason"],
        )
    output.console.print(table)
    summary = f"{report['compiled']} kernels compiled, {report['cached']} were in the cache"
    if report["triton_runs"]:
        summary += f"; {report['triton_runs']} calls run for Triton's cache"
    output.console.print(f"{summary}; {report['seconds']:.1f} s", highlight=False)
    if report["tuned"] is not None:
        saved = [result for result in report["tuned"]["results"] if result["saved"]]
        output.console.print(
            f"{len(saved)} of {len(report['tuned']['results'])} tiles measured faster than the heuristic's, kept in "
            f"{report['tuned']['file']}"
            if saved
            else "no tile measured faster than the heuristic's",
            highlight=False,
            soft_wrap=True,
        )
    for failure in report["failed"]:
        output.warn(f"{failure['program']}: {failure['error']}")
    if report["missing"] is not None:
        output.warn(report["missing"])


def _ranges(numbers: list[int]) -> str:
    """Ascending integers as in 1-16,64."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _tokens(text: str) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(1, MOST_TOKENS + 1))
    tokens: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and int(end) for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(
                f"{part!r} is no number or range of tokens: write them as in 1-16,64, or all"
            )
        tokens.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(tokens))
