"""Which kernels ternary layers and their optimizer use outside of graphs, for a while."""

import contextlib
import os
from collections.abc import Iterator

from ternarize.config import Kernels

#: Variables of one meaning (`ternarize.config`): all are set, because two that differ are an error.
KERNELS = ("TERNARIZE_BACKEND", "ARB_TERNARY_BACKEND")
TILELANG_TRAINING = ("TERNARIZE_TILELANG_TRAINING", "ARB_TILELANG_TRAINING")


@contextlib.contextmanager
def eager_kernels(kernels: Kernels) -> Iterator[None]:
    """Use these kernels; TileLang's also in training, as whoever measures them there wants it."""
    values = dict.fromkeys(KERNELS, kernels) | (dict.fromkeys(TILELANG_TRAINING, "1") if kernels == "tilelang" else {})
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)
