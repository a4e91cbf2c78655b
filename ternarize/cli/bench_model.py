"""``ternarize bench decode`` and ``prefill``: arguments, table and JSON of `ternarize.bench.model`."""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from rich.table import Table

from ternarize.bench.llama import SHAPES, layers_that_fit, model_config, with_layers
from ternarize.bench.model import Plan, Result, measure_batch
from ternarize.bench.step import Work
from ternarize.bench.turns import DENSE
from ternarize.cli.arguments import (
    DTYPES,
    add_activation_argument,
    add_kernels_argument,
    add_layer_arguments,
    positive_number,
    positive_numbers,
    seconds,
)
from ternarize.cli.bench_rows import end_if_interrupted, number, outcome, times
from ternarize.cli.output import Output, finite
from ternarize.config import Kernels, TernaryConfig
from ternarize.errors import ConfigError

#: Of each verb: sequences, and tokens of each prompt.
DEFAULTS: dict[Work, tuple[str, int]] = {"decode": ("1,16", 128), "prefill": ("1", 4096)}

FIT = "fit"


def add_arguments(parser: argparse.ArgumentParser, work: Work) -> None:
    """Those of `decode` or `prefill`."""
    batch, prompt = DEFAULTS[work]
    where = "to be read" if work == "prefill" else "in the cache already"
    parser.set_defaults(measure=measure, work=work, new_tokens=1)
    parser.add_argument(
        "--model", default="8b", help=f"shape: {', '.join(SHAPES)}, or a config.json of transformers (default 8b)"
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar=f"N|{FIT}",
        help=f"cut the model to so many layers, or to what fits the memory with all contenders at once ({FIT})",
    )
    parser.add_argument(
        "--batch", type=positive_numbers, default=batch, metavar="B,...", help=f"sequences (default {batch})"
    )
    parser.add_argument(
        "--prompt",
        type=positive_number,
        default=prompt,
        metavar="TOKENS",
        help=f"tokens of each sequence, {where} (default {prompt})",
    )
    if work == "decode":
        parser.add_argument(
            "--new-tokens", type=positive_number, default=64, metavar="TOKENS", help="steps of a round (default 64)"
        )
    add_kernels_argument(parser)
    add_activation_argument(parser)
    add_layer_arguments(parser)
    parser.add_argument(
        "--seconds", type=seconds, default=5.0, help="of timing for a batch size, everything together (default 5)"
    )
    parser.add_argument(
        "--start-times",
        action="store_true",
        help="also time the first call with empty caches of the compilers, and in a new process with full ones",
    )


def _layers(text: str) -> int | str:
    return text if text == FIT else positive_number(text)


def measure(arguments: argparse.Namespace, output: Output, device: torch.device, report: dict[str, Any]) -> None:
    """Run the sub-verb, and fill in its part of the report."""
    plan = _plan(arguments, device)
    report["command"] = command = _command(arguments, plan)
    output.console.print(command, highlight=False, soft_wrap=True)
    for batch in arguments.batch:
        with output.steps_progress() as progress:
            task = progress.add_task(f"batch {batch}", total=1)
            results = measure_batch(plan, batch)
            progress.advance(task)
        output.console.print(_table(plan, batch, results))
        for line in _lines(results):
            output.console.print(line, highlight=False, soft_wrap=True)
        report["cells"] += [_row(result, results) for result in results]
        end_if_interrupted(results, output)


def _plan(arguments: argparse.Namespace, device: torch.device) -> Plan:
    config, dtype = model_config(arguments.model), DTYPES[arguments.dtype]
    contenders: dict[str, tuple[TernaryConfig | None, Kernels]] = {DENSE: (None, "auto")}
    for activation in arguments.activation:
        ternary = TernaryConfig(group_size=arguments.group_size, planes=arguments.planes, activation=activation)
        for kernels in arguments.kernels:
            name = f"ternary {kernels}" if activation == "float" else f"ternary {kernels} {activation}"
            contenders[name] = (ternary, kernels)
    if arguments.layers == FIT:
        if device.type != "cuda":
            raise ConfigError(f"--layers {FIT} looks at the memory of a GPU, and there is none: give a number")
        free_bytes, _ = torch.cuda.mem_get_info(device)
        layers = layers_that_fit(config, [ternary for ternary, _ in contenders.values()], dtype, free_bytes)
    else:
        layers = arguments.layers or config["num_hidden_layers"]
    return Plan(
        work=arguments.work,
        config=with_layers(config, layers),
        contenders=contenders,
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        dtype=dtype,
        device=device,
        seconds=arguments.seconds,
        start_times=arguments.start_times,
    )


def _command(arguments: argparse.Namespace, plan: Plan) -> str:
    """The call with every default written out."""
    new_tokens = f"--new-tokens {plan.new_tokens} " if plan.work == "decode" else ""
    return (
        f"ternarize bench {plan.work} --model {arguments.model} --layers {plan.config['num_hidden_layers']} "
        f"--batch {','.join(map(str, arguments.batch))} --prompt {plan.prompt} {new_tokens}"
        f"--kernels {','.join(arguments.kernels)} --activation {','.join(arguments.activation)} "
        f"--group-size {arguments.group_size} --planes {arguments.planes} --dtype {arguments.dtype} "
        f"--seconds {plan.seconds:g}{' --start-times' if plan.start_times else ''}"
    )


def _row(result: Result, results: list[Result]) -> dict[str, Any]:
    row = outcome(result)
    if result.ready is not None:
        facts = dataclasses.asdict(result.ready)
        del facts["first_call_seconds"]
        row |= facts | {"error": finite(facts["error"]), "peak_bytes": result.peak_bytes}
        row |= {"cold_seconds": result.cold_seconds, "prewarmed_seconds": result.prewarmed_seconds}
    return row | times(result, results)


def _table(plan: Plan, batch: int, results: list[Result]) -> Table:
    title = f"{plan.work}, batch {batch}, {plan.prompt} tokens {'read' if plan.work == 'prefill' else 'in the cache'}"
    table = Table(title=title)
    for name in ("model", "ms", "device", "tokens/s", "x dense", "GB", "peak", "error"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for result in results:
        row = _row(result, results)
        table.add_row(
            result.contender,
            number(row.get("milliseconds"), "{:.3f}") or result.status,
            number(row.get("device_milliseconds"), "{:.3f}"),
            number(row.get("tokens_per_second"), "{:.0f}"),
            number(row.get("times_dense"), "{:.2f}"),
            number(row.get("resident_bytes"), "{:.1f}", 1e9),
            number(row.get("peak_bytes"), "{:.1f}", 1e9),
            number(row.get("error"), "{:.1e}"),
        )
    return table


def _lines(results: list[Result]) -> Iterator[str]:
    """What a table has no room for: kernels, graph, start, and why something has no time."""
    for result in results:
        if result.ready is None:
            yield f"{result.contender}: {result.status}: {result.reason}"
            continue
        facts = ["one CUDA graph" if result.ready.cuda_graph else "no CUDA graph (TORCH_LOGS=cudagraphs says why)"]
        facts += [f"{kernel} x {number}" for kernel, number in result.ready.kernels.items()]
        if result.cold_seconds is not None:
            facts.append(f"first call {result.cold_seconds:.1f} s cold")
        if result.prewarmed_seconds is not None:
            facts.append(f"{result.prewarmed_seconds:.1f} s prewarmed")
        if result.reason:
            facts.append(f"{result.status}: {result.reason}")
        yield f"{result.contender}: {', '.join(facts)}"
