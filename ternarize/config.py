"""What kind of ternary layer to make: one frozen record, passed by value, stored in checkpoints."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from ternarize.errors import ConfigError
from ternarize.packing import check_group_size

Rule = Literal["factored", "sign"]
Accumulator = Literal["int8", "int4"]
Init = Literal["absmean", "least_squares", "exact"]
Activation = Literal["float", "int8"]
Kernels = Literal["auto", "tilelang", "triton", "torch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TernaryConfig:
    """How `ternarize` makes its layers.

    Raises:
        ConfigError: for a value or a combination that means nothing.
    """

    group_size: int = 128
    """Weights that share an exponent along K: a positive multiple of 4, or -1 for whole rows."""

    planes: Literal[1, 2, 3] = 1
    """Trit planes: 3, 9 or 27 levels a weight. One plane trains; two and three serve converted dense checkpoints."""

    init: Init = "absmean"
    """How a dense weight becomes levels: `absmean` (BitNet b1.58: 2^E near the mean magnitude; one plane only) or
    `least_squares` (per group, the power of two with the smallest squared error). More planes always use the latter.
    `exact` is for weights that are ternary already, -s, 0 and s in each group: s is kept as it is, an integer mantissa
    times 2^E; one plane only."""

    activation: Activation = "float"
    """How a layer multiplies its input: `float`, as it comes (W2A16), or `int8`, rounded to 8 bits with one scale a
    token (W2A8, BitNet b1.58). It changes no weight and no training state."""

    rule: Rule = "factored"
    """Which integer update rule a trainable layer keeps state for."""

    accumulator: Accumulator = "int8"
    """Form of the `factored` state: int8 accumulator and int8 momentum (18 bits a weight with the trits), or both as
    nibbles of one byte (10 bits)."""

    train_exponents: bool | None = None
    """Whether training steps E. None: as the rule was measured to work best, on for `sign`, off for `factored`."""

    def __post_init__(self) -> None:
        check_group_size(self.group_size)
        for name, choices in (
            ("planes", (1, 2, 3)),
            ("init", get_args(Init)),
            ("activation", get_args(Activation)),
            ("rule", get_args(Rule)),
            ("accumulator", get_args(Accumulator)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(map(str, choices))}"
                )
        if self.init == "exact" and self.planes > 1:
            raise ConfigError(f"init='exact' keeps weights that are ternary already in one plane: planes={self.planes}")
        if self.rule == "sign" and self.accumulator == "int4":
            raise ConfigError("accumulator='int4' is a form of the 'factored' rule: drop it, or use rule='factored'")

    @property
    def steps_exponents(self) -> bool:
        """Whether a trainable layer keeps E_accum and steps E by it."""
        return self.rule == "sign" if self.train_exponents is None else self.train_exponents

    @property
    def form(self) -> str:
        """What a trainable layer's state is: `int8` or `int4` under `factored`, `sign`."""
        return "sign" if self.rule == "sign" else self.accumulator


def environment(name: str, old_name: str, default: str) -> tuple[str, str]:
    """An environment variable that has an older name with the same meaning: the name that is set, and its value.

    Raises:
        ConfigError: if both are set and differ.
    """
    value, old = os.environ.get(name), os.environ.get(old_name)
    if value is not None and old is not None and value != old:
        raise ConfigError(f"{name}={value!r} and {old_name}={old!r} mean the same and differ: unset one of them")
    if value is None and old is not None:
        return old_name, old
    return name, default if value is None else value


def kernels_policy(value: str | None = None) -> Kernels:
    """Which kernels to use: ``value`` if given, else TERNARIZE_BACKEND, else 'auto'.

    Raises:
        ConfigError: for anything but auto, tilelang, triton and torch.
    """
    source, chosen = "options={'kernels': ...}", value
    if chosen is None:
        source, chosen = environment("TERNARIZE_BACKEND", "ARB_TERNARY_BACKEND", "auto")
    for choice in get_args(Kernels):
        if chosen == choice:
            return choice  # type: ignore[no-any-return]  # get_args is untyped
    raise ConfigError(f"{source} is {chosen!r}: use one of auto, tilelang, triton, torch")


@contextlib.contextmanager
def eager_kernels(kernels: Kernels, *, tilelang_training: bool = False) -> Iterator[None]:
    """Set what the environment says for a while: which kernels run outside of graphs, in the optimizer above all.

    Args:
        kernels: which to use.
        tilelang_training: whether TileLang may also be forced in training graphs.
    """
    # Both names: if they differ, that is an error.
    values = dict.fromkeys(("TERNARIZE_BACKEND", "ARB_TERNARY_BACKEND"), str(kernels))
    if tilelang_training:
        values |= dict.fromkeys(("TERNARIZE_TILELANG_TRAINING", "ARB_TILELANG_TRAINING"), "1")
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


def flag(name: str, old_name: str, *, default: bool) -> bool:
    """A boolean environment variable, 0 or 1.

    Raises:
        ConfigError: for any other value.
    """
    source, value = environment(name, old_name, "1" if default else "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{source} is {value!r}: use 0 or 1")
    return value == "1"


def cache_dir() -> Path:
    """Where measured choices are kept: TERNARIZE_CACHE_DIR, or ternarize in the user's XDG cache directory."""
    own = os.environ.get("TERNARIZE_CACHE_DIR")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or Path(shared) / "ternarize").expanduser()
