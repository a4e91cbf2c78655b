"""Which layers are left dense by their names: one rule for modules, graphs and checkpoints."""

import re
from collections.abc import Sequence

from ternarize.errors import ConfigError

#: Kept dense unless ``include`` names them: output heads, embeddings and routers lose most and weigh least.
DEFAULT_EXCLUDE = ("lm_head", "embed_out", "output_layer", ".*embed.*", "router", "gate", "wte", "wpe")


def matches(name: str, pattern: str) -> bool:
    """Whether a regular expression covers one or more whole parts of a dotted name: 'mlp' is in 'layers.0.mlp.up'.

    Raises:
        ConfigError: if the pattern is no regular expression.
    """
    try:
        return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from None


def skip_reason(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str | None:
    """Why the layer of this name stays dense, or None if it does not.

    Args:
        name: qualified name of the layer.
        include: if given, only layers that match one of these are converted, also where the defaults exclude them.
        exclude: layers that match one of these are never converted. `DEFAULT_EXCLUDE` is always added.
    """
    for pattern in exclude or ():
        if matches(name, pattern):
            return f"excluded by {pattern!r}"
    if include is not None:
        return None if any(matches(name, pattern) for pattern in include) else "not in include"
    for pattern in DEFAULT_EXCLUDE:
        if matches(name, pattern):
            return f"kept dense by default ({pattern}): name it in include to convert it"
    return None
