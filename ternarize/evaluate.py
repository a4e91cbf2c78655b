"""Load a language model from any of the formats that convert reads, and measure its perplexity."""

import dataclasses
import importlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ternarize.causal import positions, require_causal
from ternarize.checkpoint import from_pretrained
from ternarize.checkpoint.format import QUANT_METHOD
from ternarize.checkpoint.source import quant_method, read_config
from ternarize.errors import CheckpointError, ConfigError, NonFiniteError, out_of_memory

#: Tokens of a window, for models that have as many positions.
WINDOW = 512


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What `perplexity` measured."""

    perplexity: float
    """exp(nll)."""
    nll: float
    """Mean negative log-likelihood of a scored token, in nats."""
    tokens: int
    """Scored tokens: the first of each window is not one of them."""
    window: int
    """Tokens of a window."""
    seconds: float
    """Wall time of the forward passes, compilation included if the model is compiled in the first."""

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens over wall time."""
        return self.tokens / self.seconds


def sample_text() -> str:
    """The text that ternarize ships: about 2,300 words of plain English prose (ternarize/data/README.md)."""
    return resources.files("ternarize").joinpath("data", "sample.txt").read_text(encoding="utf-8")


def default_device() -> torch.device:
    """The first CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        path: a folder that `ternarize convert` or `ternarize.save_pretrained` wrote, a dense transformers folder, or a
            .gguf file, which transformers dequantises to a dense model.
        device: where to put the model; the GPU if there is one by default.
        dtype: of the floating-point parameters; as stored by default (float32 for GGUF).

    Returns:
        The model, in eval mode, and its transformers tokenizer.

    Raises:
        CheckpointError: if ``path`` is none of these, is damaged, has no tokenizer or is not causal, or transformers is
            missing.
    """
    path = Path(path)
    transformers = require_transformers()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a folder with config.json, or a .gguf file")
    if path.suffix == ".gguf":
        folder, source = path.parent, {"gguf_file": path.name}
    elif (path / "config.json").is_file():
        folder, source = path, {}
    else:
        raise CheckpointError(f"{path} is no model: give a folder with config.json, or a .gguf file")
    with without_progress_bars(transformers):
        model, tokenizer = _load(transformers, path, folder, source, dtype)
    # Only the floating-point parameters change: the integers of ternary layers keep their dtypes.
    model = model.to(device=device or default_device(), dtype=dtype).eval()
    try:
        require_causal(model)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model, tokenizer


def _load(
    transformers: ModuleType, path: Path, folder: Path, source: dict[str, str], dtype: torch.dtype | None
) -> tuple[nn.Module, Any]:
    packed = quant_method(read_config(path)) == QUANT_METHOD
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)
    # Loading code of a hundred architectures raises whatever comes to it.
    except Exception as error:
        raise CheckpointError(f"{path} has no tokenizer that transformers can load: {error}") from error
    if packed:
        return from_pretrained(path, dtype=dtype), tokenizer
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype or (torch.float32 if source else "auto"), **source
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(f"transformers cannot load {path}: {error}") from error
    return model, tokenizer


def perplexity(
    model: nn.Module, tokenizer: Any, text: str, *, window: int | None = None, max_tokens: int | None = None
) -> Perplexity:
    """Perplexity of a causal language model on a text, in non-overlapping windows.

    Each window starts without context, so its first token is not scored. The last window may be shorter.

    Args:
        model: takes ``input_ids`` int64 [1, S] and returns an object with ``logits`` [1, S, V].
        tokenizer: a transformers tokenizer.
        text: to be scored; no special tokens are added.
        window: S, tokens a window, at least 2; None: 512, or all positions of a model that has fewer.
        max_tokens: use only so many tokens from the start of the text.

    Raises:
        ConfigError: for a window, or a text, of fewer than 2 tokens, or a window longer than the model's positions.
        NonFiniteError: if the model's log-likelihood is not finite.
    """
    if window is None:
        window = min(WINDOW, positions(model))
    if window > positions(model):
        raise ConfigError(f"window is {window}, the model has {positions(model)} positions: use at most as many")
    if window < 2:
        raise ConfigError(f"window is {window}: it needs at least 2 tokens, of which the first is not scored")
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[:, :max_tokens]
    if tokens.shape[1] < 2:
        raise ConfigError(f"the text has {tokens.shape[1]} tokens, perplexity needs at least 2: give more text")
    tokens = tokens.to(next(model.parameters()).device)
    total, scored = 0.0, 0
    start = time.perf_counter()
    with torch.no_grad():
        for ids in tokens.split(window, 1):
            # A last window of one token has nothing to score.
            if ids.shape[1] > 1:
                logits = model(input_ids=ids, use_cache=False).logits
                total += nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
                scored += ids.shape[1] - 1
    seconds = time.perf_counter() - start
    nll = total / scored
    if not math.isfinite(nll):
        raise NonFiniteError(f"the mean log-likelihood is {nll}: the model's weights or its dtype are broken")
    # The float64 exp of torch gives inf where that of math raises.
    return Perplexity(torch.tensor(nll, dtype=torch.float64).exp().item(), nll, scored, window, seconds)


@contextmanager
def without_progress_bars(transformers: ModuleType) -> Iterator[None]:
    """Errors and JSON must not share the terminal with the bars of a load that takes seconds."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def require_transformers() -> ModuleType:
    """The package transformers, which is an optional dependency.

    Raises:
        CheckpointError: if it is not there.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(
            f"this needs transformers ({error}): run pip install 'ternarize[transformers]'"
        ) from error
