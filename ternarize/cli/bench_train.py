"""``ternarize bench train``: arguments, table and JSON of `ternarize.bench.train`."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import torch
from rich.table import Table

from ternarize.bench.llama import SHAPES, model_config, with_layers
from ternarize.bench.train import Plan, measure_training, teraflops
from ternarize.bench.train_step import Ready
from ternarize.bench.turns import DENSE, Result
from ternarize.cli.arguments import (
    add_group_size_argument,
    add_kernels_argument,
    names_of,
    positive_number,
    seconds,
)
from ternarize.cli.bench_rows import end_if_interrupted, number, outcome, times
from ternarize.cli.machine import device_argument
from ternarize.cli.output import Output, finite
from ternarize.config import Accumulator, Kernels, Rule, TernaryConfig
from ternarize.errors import ConfigError
from ternarize.layer import Apply


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-verb."""
    parser.set_defaults(measure=measure)
    parser.add_argument(
        "--model", default="1b", help=f"shape: {', '.join(SHAPES)}, or a config.json of transformers (default 1b)"
    )
    parser.add_argument("--layers", type=positive_number, metavar="N", help="cut the model to so many layers")
    parser.add_argument("--batch", type=positive_number, default=4, metavar="B", help="sequences (default 4)")
    parser.add_argument("--ctx", type=positive_number, default=2048, metavar="S", help="tokens of each (default 2048)")
    parser.add_argument(
        "--rule", choices=get_args(Rule), default="factored", help="of ternary contenders (default factored)"
    )
    parser.add_argument(
        "--accumulator",
        type=lambda text: names_of("accumulators", text, get_args(Accumulator)),
        metavar="NAME,...",
        help="of factored: int8, 18 bits a weight in all, int4, 10 bits (default both)",
    )
    parser.add_argument(
        "--apply",
        type=lambda text: names_of("modes", text, get_args(Apply)),
        default="step",
        metavar="NAME,...",
        help=f"when integers change, as of TernaryOptimizer: {', '.join(get_args(Apply))} (default step)",
    )
    add_kernels_argument(parser)
    add_group_size_argument(parser)
    parser.add_argument(
        "--checkpointing", action="store_true", help="keep only the input of each block and run it again in backward"
    )
    parser.add_argument("--seconds", type=seconds, default=20.0, help="of timing, everything together (default 20)")
    parser.add_argument(
        "--trace-memory",
        action="store_true",
        help="also look for allocations as large as a float matrix of a ternary layer, on a GPU",
    )
    parser.add_argument("--device", type=device_argument, help="default: the first GPU, or the CPU")


def measure(arguments: argparse.Namespace, output: Output, device: torch.device, report: dict[str, Any]) -> None:
    """Run the sub-verb, and fill in its part of the report."""
    plan = _plan(arguments, device)
    report["command"] = command = _command(arguments, plan)
    output.console.print(command, highlight=False, soft_wrap=True)
    with output.steps_progress() as progress:
        task = progress.add_task("train", total=1)
        results = measure_training(plan)
        progress.advance(task)
    output.console.print(_table(plan, results))
    for result in results:
        line = f"{result.contender}: {', '.join(_facts(result))}"
        output.console.print(line, highlight=False, soft_wrap=True)
    report["cells"] += [_row(result, results) for result in results]
    end_if_interrupted(results, output)


def _plan(arguments: argparse.Namespace, device: torch.device) -> Plan:
    if arguments.trace_memory and device.type != "cuda":
        raise ConfigError(f"--trace-memory reads the history of a GPU's allocator, and this is {device}: drop it")
    config = model_config(arguments.model)
    contenders: dict[str, tuple[TernaryConfig | None, Kernels, Apply]] = {DENSE: (None, "auto", "step")}
    for accumulator in _accumulators(arguments):
        ternary = TernaryConfig(group_size=arguments.group_size, rule=arguments.rule, accumulator=accumulator)
        for kernels in arguments.kernels:
            for apply in arguments.apply:
                name = f"{kernels} {ternary.form}{'' if apply == 'step' else f' {apply}'}"
                contenders[name] = (ternary, kernels, apply)
    return Plan(
        config=with_layers(config, arguments.layers or config["num_hidden_layers"]),
        contenders=contenders,
        batch=arguments.batch,
        ctx=arguments.ctx,
        checkpointing=arguments.checkpointing,
        trace_memory=arguments.trace_memory,
        device=device,
        seconds=arguments.seconds,
    )


def _accumulators(arguments: argparse.Namespace) -> tuple[Accumulator, ...]:
    if arguments.accumulator is not None:
        given: tuple[Accumulator, ...] = arguments.accumulator
        return given
    return ("int8", "int4") if arguments.rule == "factored" else ("int8",)


def _command(arguments: argparse.Namespace, plan: Plan) -> str:
    """The call with every default written out."""
    return (
        f"ternarize bench train --model {arguments.model} --layers {plan.config['num_hidden_layers']} "
        f"--batch {plan.batch} --ctx {plan.ctx} --rule {arguments.rule} "
        f"--accumulator {','.join(_accumulators(arguments))} --apply {','.join(arguments.apply)} "
        f"--kernels {','.join(arguments.kernels)} "
        f"--group-size {arguments.group_size} --seconds {plan.seconds:g} --device {plan.device}"
        f"{' --checkpointing' if plan.checkpointing else ''}{' --trace-memory' if plan.trace_memory else ''}"
    )


def _row(result: Result[Ready], results: list[Result[Ready]]) -> dict[str, Any]:
    row = outcome(result)
    if result.ready is not None:
        facts = dataclasses.asdict(result.ready)
        facts |= {name: finite(facts[name]) for name in ("loss_error", "integer_error", "allowed_integer_error")}
        row |= facts | {"losses": [finite(loss) for loss in result.ready.losses], "peak_bytes": result.peak_bytes}
    row |= times(result, results)
    if result.seconds is not None:
        row |= {f"{name}_milliseconds": seconds * 1e3 for name, seconds in result.phases.items()}
        row["teraflops_per_second"] = teraflops(result)
    return row


def _table(plan: Plan, results: list[Result[Ready]]) -> Table:
    table = Table(title=f"train, {plan.batch} x {plan.ctx} tokens")
    for name in ("model", "ms", "device", "tokens/s", "x dense", "peak", "B/w"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for result in results:
        row = _row(result, results)
        table.add_row(
            result.contender,
            number(row.get("milliseconds"), "{:.1f}") or result.status,
            number(row.get("device_milliseconds"), "{:.1f}"),
            number(row.get("tokens_per_second"), "{:.0f}"),
            number(row.get("times_dense"), "{:.2f}"),
            number(row.get("peak_bytes"), "{:.1f}", 1e9),
            number(row.get("bytes_a_weight"), "{:.2f}"),
        )
    return table


def _facts(result: Result[Ready]) -> Iterator[str]:
    """What a table has no room for: parts of a step, start, kernels, check, and why something has no time."""
    ready = result.ready
    if ready is not None:
        rate = teraflops(result)
        if rate is not None:
            yield f"{rate:.3g} TFLOP/s"
            yield ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in result.phases.items())
        yield f"first step {ready.first_step_seconds:.1f} s"
        for kernel, layers in ready.kernels.items():
            yield f"{kernel} x {layers}"
        yield f"{ready.graph_breaks} graph breaks"
        yield "CUDA graphs" if ready.cuda_graphs else "no CUDA graphs (TORCH_LOGS=cudagraphs says why)"
        yield f"loss {ready.losses[0]:.3f} to {ready.losses[-1]:.3f} in {len(ready.losses)} steps"
        yield f"off by {ready.loss_error:.1e}"
        if ready.integer_error is not None and ready.allowed_integer_error is not None:
            yield f"{ready.integer_error:.1%} of integers differ ({ready.allowed_integer_error:.1%} allowed)"
        if ready.weight_sized_allocations is not None:
            found = [f"{number} of {size}" for size, number in ready.weight_sized_allocations.items()]
            yield f"allocations the size of a float matrix: {' and '.join(found) or 'none'}"
    if result.reason:
        yield f"{result.status}: {result.reason}"
