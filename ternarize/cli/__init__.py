"""The command line: one file a verb, each with HELP, add_arguments(parser) and run(arguments, output)."""

import argparse
import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from torch._dynamo.exc import BackendCompilerFailed

from ternarize.checkpoint.format import tool_version
from ternarize.cli.output import Interrupted, Output
from ternarize.errors import ConfigError, TernarizeError, cause_of, out_of_memory
from ternarize.signals import interrupted_by

VERBS = ("convert", "inspect", "train", "eval", "generate", "bench", "prewarm", "smoke", "doctor")

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage; exit code 2."""
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    parser = _Parser(prog="ternarize", description="Ternary PyTorch models: convert, look into, measure and run them.")
    parser.add_argument("--version", action="version", version=f"ternarize {tool_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        module = importlib.import_module(f"ternarize.cli.{verb}")
        sub = verbs.add_parser(verb, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(json=False, quiet=False)
        add_output_arguments(sub)
    return parser


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--json and --quiet, of a verb or sub-verb; a sub-verb without them leaves what the verb was given."""
    for option, meaning in (
        ("--json", "print one JSON object on standard output, nothing else"),
        ("--quiet", "no progress bars"),
    ):
        parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=meaning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0 if it worked, 1 if not, 2 for a wrong call, 130 for an interrupt."""
    arguments = build_parser().parse_args(argv)
    output = Output(as_json=arguments.json, quiet=arguments.quiet)
    # Compilers of kernels log to standard output.
    elsewhere = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    try:
        with elsewhere, interrupted_by(signal.SIGTERM):
            result: dict[str, Any] = importlib.import_module(f"ternarize.cli.{arguments.verb}").run(arguments, output)
    except KeyboardInterrupt as interrupt:
        report = interrupt.report if isinstance(interrupt, Interrupted) else None
        return _fail(output, "interrupted", INTERRUPTED, report)
    except (TernarizeError, OSError, BackendCompilerFailed) as error:
        cause = cause_of(error)
        if not isinstance(cause, (TernarizeError, OSError)):
            raise
        return _fail(output, _message(cause), USAGE if isinstance(cause, ConfigError) else FAILURE)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(output, f"out of memory ({error}): do less at a time, as by a smaller batch or window", FAILURE)
    if output.as_json:
        print(json.dumps(result))
    return FAILURE if result.get("ok") is False else OK


def _message(error: TernarizeError | OSError) -> str:
    # The system names the file and what was wrong, not what to do.
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename} cannot be read or written ({error.strerror}): mend that, or name another path"
    return str(error)


def _fail(output: Output, message: str, code: int, report: dict[str, Any] | None = None) -> int:
    line = " ".join(message.split())
    if output.as_json:
        print(json.dumps({**(report or {}), "ok": False, "error": line}))
    else:
        print(f"ternarize: error: {line}", file=sys.stderr)
    return code
