"""Arguments that several verbs take."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, get_args

import torch

from ternarize.config import Activation, Kernels
from ternarize.errors import ConfigError

Name = TypeVar("Name", bound=str)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_group_size_argument(parser: argparse.ArgumentParser) -> None:
    """Of the ternary layers."""
    parser.add_argument(
        "--group-size", type=int, default=128, help="weights that share an exponent; -1 for whole rows (default 128)"
    )


def add_kernels_argument(parser: argparse.ArgumentParser) -> None:
    """Which ternary contenders there are."""
    parser.add_argument(
        "--kernels",
        type=lambda text: names_of("kernels", text, get_args(Kernels)),
        default="auto",
        metavar="NAME,...",
        help="of ternary contenders: auto, tilelang, triton, torch (default auto)",
    )


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """What the ternary layers are, and the dtype of everything else."""
    add_group_size_argument(parser)
    parser.add_argument("--planes", type=int, choices=(1, 2, 3), default=1, help="trit planes (default 1)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of floats (default bfloat16)")


def add_activation_argument(parser: argparse.ArgumentParser) -> None:
    """How ternary layers take x."""
    parser.add_argument(
        "--activation",
        type=lambda text: names_of("activations", text, get_args(Activation)),
        default="float",
        metavar="NAME,...",
        help="how ternary layers take x: float, int8 (default float)",
    )


def positive_number(text: str) -> int:
    """A number of tokens, sequences, layers or jobs."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number: give 1 or more")
    return int(text)


def positive_numbers(text: str) -> tuple[int, ...]:
    """Numbers of tokens or sequences, as in 1,16,256."""
    return tuple(positive_number(part) for part in text.split(","))


def seconds(text: str) -> float:
    """A time, 0 for the least that is measured."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds: write 0 or more")
    return value


def read_text(option: str, path: Path) -> str:
    """The text of the file that an option names.

    Raises:
        ConfigError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{option} {path} is not UTF-8 text ({where}): convert it to that") from None


def names_of(what: str, text: str, known: Sequence[Name]) -> tuple[Name, ...]:
    """Some of the known names, as in tilelang,triton."""
    by_name = {str(name): name for name in known}
    for part in text.split(","):
        if part not in by_name:
            raise argparse.ArgumentTypeError(f"{part!r} is not among {what}: use some of {','.join(by_name)}")
    return tuple(by_name[part] for part in text.split(","))
