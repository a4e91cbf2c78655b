"""Tiles that were measured to be faster than those that the heuristics choose.

Two tables, in one format: `SHIPPED`, of the package, for a generation of GPUs, and one that ``ternarize prewarm
--tune`` writes to the cache directory for one kind of GPU and one version of the kernels. The latter wins.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tilelang
from filelock import FileLock

from ternarize.backends.tilelang.layers import Dtype, LayerShape
from ternarize.backends.tilelang.linear_decode import DecodeTile
from ternarize.backends.tilelang.linear_wgmma import Tile
from ternarize.checkpoint.write import new_file
from ternarize.config import Activation, cache_dir

log = logging.getLogger(__name__)

AnyTile = DecodeTile | Tile

#: The entries that hold for every Hopper card.
SHIPPED = Path(__file__).with_name("tuned_sm_90a.json")

#: More tokens than this share one entry: the largest tiles are full long before.
MOST_TOKENS = 8192

_TILES: dict[str, type[DecodeTile] | type[Tile]] = {"decode": DecodeTile, "wgmma": Tile}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """What an entry holds for."""

    layers: tuple[LayerShape, ...]
    """Of one call, in its order."""
    K: int
    g: int
    """Weights a scale group; K for whole rows."""
    dtype: Dtype
    activation: Activation
    tokens: int
    """The largest of the entry's token counts, a power of two: it holds for more than half of it, see `bucket`."""


def bucket(M: int) -> int:
    """The token count under which M tokens are looked up: the next power of two, at most `MOST_TOKENS`."""
    return min(1 << (M - 1).bit_length(), MOST_TOKENS)


@functools.cache
def kernels_version() -> str:
    """A digest of what makes a kernel: the programs' sources and the release of TileLang."""
    folder = Path(__file__).parent
    sources = sorted([*folder.glob("linear_*.py"), *folder.glob("*.cuh")])
    parts = [tilelang.__version__.encode(), *(source.read_bytes() for source in sources)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def table_file(gpu: str) -> Path:
    """The user's table for a GPU, named as `torch.cuda.get_device_name` does, and the kernels of this package."""
    return cache_dir() / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '_', gpu)}-{kernels_version()}.json"


def tuned_tile(
    gpu: str | None, M: int, layers: tuple[LayerShape, ...], K: int, g: int, dtype: Dtype, activation: Activation
) -> AnyTile | None:
    """The measured tile of a call, or None where the heuristics are to choose.

    Args:
        gpu: whose table to read beside the shipped one; none if None.
        M: tokens.
        layers: of the call.
        K: in_features.
        g: weights a scale group.
        dtype: of y, and of x unless that is int8.
        activation: int8 for x in int8.
    """
    return table(gpu).get(Key(layers=layers, K=K, g=g, dtype=dtype, activation=activation, tokens=bucket(M)))


@functools.cache
def table(gpu: str | None) -> dict[Key, AnyTile]:
    """All entries for a GPU, read once a process."""
    files = [SHIPPED] if gpu is None else [SHIPPED, table_file(gpu)]
    return {key: tile for file in files for key, tile in _read(file).items()}


def save(gpu: str, entries: Mapping[Key, AnyTile]) -> Path:
    """Add entries to the user's table for a GPU, in place of older ones for the same calls.

    Processes that save at the same time wait for each other; one that reads sees the old table or the new one.

    Returns:
        The file.

    Raises:
        OSError: if the cache directory cannot be written.
    """
    file = table_file(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        merged = {**_read(file), **entries}
        with new_file(file) as written:
            written.write_text(json.dumps([_to_json(key, tile) for key, tile in merged.items()], indent=1))
    table.cache_clear()
    return file


def _to_json(key: Key, tile: AnyTile) -> dict[str, Any]:
    program = next(name for name, kind in _TILES.items() if isinstance(tile, kind))
    return {**dataclasses.asdict(key), "program": program, "tile": dataclasses.asdict(tile)}


def _from_json(entry: dict[str, Any]) -> tuple[Key, AnyTile]:
    layers = tuple(LayerShape(**layer) for layer in entry["layers"])
    key = Key(layers=layers, **{name: entry[name] for name in ("K", "g", "dtype", "activation", "tokens")})
    sizes = entry["tile"]
    if not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise ValueError("a size is no natural number")
    return key, _TILES[entry["program"]](**sizes)


def _read(file: Path) -> dict[Key, AnyTile]:
    """The entries of a file; none, and a warning, if it is not what `save` writes."""
    try:
        return dict(_from_json(entry) for entry in json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    # Whatever a stranger's file makes of the lines above; nesting without end is a RecursionError.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("%s is ignored, it is no table of tiles (%s): delete it", file, error)
        return {}
