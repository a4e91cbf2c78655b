"""What the tests of linear_decode.cuh run: its cases, and what a call takes for what it does besides."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.activation import dequantize_activation, quantize_activation
from tests.backends.hopper_kit import ROUNDING_ERROR, Case, Operands, layer_shape

# The cases are made of its shapes of layers.
pytest.importorskip("tilelang", reason="TileLang is for Linux")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """A case; ``tile`` has the fields of DecodeTile that are not 1, ``fused`` is what is done besides."""

    fused: tuple[str, ...] = ()
    """Names of `ternarize.backends.tilelang.linear_decode.FUSED`."""

    def decode_tile(self) -> Any:
        from ternarize.backends.tilelang.linear_decode import DecodeTile

        least = dict.fromkeys((field.name for field in dataclasses.fields(DecodeTile)), 1)
        tokens = next(tokens for tokens in (1, 2, 4, 8, 16) if tokens >= self.M)
        return DecodeTile(**{**least, "TOKENS": tokens, "STAGES": 2, "WARPS": 2, "DIGITS": 0, **self.tile})

    def multiplied(self, x: Tensor) -> Tensor:
        """What x, in float64, is multiplied as."""
        if self.tile.get("DIGITS") != 1:
            return x
        return dequantize_activation(*quantize_activation(x), torch.float64)


#: Added to mean squares.
EPS = 1e-2

CASES = {
    "one token": DecodeCase(M=1, layers=(layer_shape(16),), K=512, g=128),
    "digits": DecodeCase(M=1, layers=(layer_shape(16),), K=512, g=128, tile={"DIGITS": 3}),
    "digits, three layers": DecodeCase(
        M=2,
        layers=(layer_shape(33, bias=True), layer_shape(5), layer_shape(17, bias=True)),
        K=1152,
        g=128,
        tile={"CLUSTERS": 3, "WARPS": 4, "K_WARPS": 2, "DIGITS": 3},
    ),
    "digits, groups of 64": DecodeCase(
        M=2, layers=(layer_shape(33, bias=True),), K=1216, g=64, dtype="float16", tile={"CLUSTER": 2, "DIGITS": 3}
    ),
    "digits, groups of 256, the last of 192": DecodeCase(
        M=1, layers=(layer_shape(19),), K=960, g=256, tile={"STAGES": 3, "DIGITS": 3}
    ),
    "digits, a group a row": DecodeCase(M=2, layers=(layer_shape(19),), K=192, g=192, tile={"DIGITS": 3}),
    "rounded": DecodeCase(M=1, layers=(layer_shape(19),), K=1088, g=128, tile={"K_WARPS": 2, "DIGITS": 1}),
    "rounded, three layers": DecodeCase(
        M=3,
        layers=(layer_shape(33, bias=True), layer_shape(5), layer_shape(17, bias=True)),
        K=2432,
        g=128,
        tile={"CLUSTERS": 3, "CLUSTER": 2, "WARPS": 4, "K_WARPS": 2, "DIGITS": 1},
    ),
    "rounded, 16 tokens": DecodeCase(
        M=13, layers=(layer_shape(19),), K=1216, g=64, dtype="float16", tile={"WARPS": 8, "DIGITS": 1}
    ),
    "rounded, a group a row": DecodeCase(M=2, layers=(layer_shape(19),), K=192, g=192, tile={"DIGITS": 1}),
    "K split over warps and blocks": DecodeCase(
        M=16, layers=(layer_shape(70, bias=True),), K=2048, g=128, tile={"TILES": 2, "CLUSTER": 2, "K_WARPS": 2}
    ),
    "three layers": DecodeCase(
        M=2,
        layers=(layer_shape(33, bias=True), layer_shape(5), layer_shape(17, bias=True)),
        K=1024,
        g=128,
        tile={"CLUSTERS": 3, "WARPS": 4, "K_WARPS": 2},
    ),
    "one row": DecodeCase(M=2, layers=(layer_shape(1),), K=1024, g=128, tile={"TILES": 2}),
    "float16": DecodeCase(M=8, layers=(layer_shape(20, bias=True),), K=1024, g=128, dtype="float16"),
    "part of a step": DecodeCase(M=3, layers=(layer_shape(40),), K=1152, g=128, tile={"STAGES": 3}),
    "groups of 64": DecodeCase(M=5, layers=(layer_shape(19),), K=1216, g=64, tile={"K_WARPS": 2}),
    "groups of 256, the last of 192": DecodeCase(M=2, layers=(layer_shape(19),), K=960, g=256),
    "the last group of 64": DecodeCase(M=2, layers=(layer_shape(19),), K=704, g=128, dtype="float16"),
    "a group a row": DecodeCase(M=2, layers=(layer_shape(19),), K=192, g=192),
    "two planes": DecodeCase(
        M=2, layers=(layer_shape(19, planes=2), layer_shape(35, planes=2)), K=512, g=64, dtype="float16"
    ),
    "three planes": DecodeCase(M=2, layers=(layer_shape(19, planes=3),), K=1024, g=128),
    "mantissas of a byte": DecodeCase(M=1, layers=(layer_shape(19, mantissa="uint8"),), K=896, g=128),
    "mantissas of two bytes": DecodeCase(M=1, layers=(layer_shape(19, mantissa="int16"),), K=960, g=64),
    "mantissas of four bytes": DecodeCase(
        M=1, layers=(layer_shape(19, mantissa="int32"),), K=896, g=128, dtype="float16"
    ),
    "normalised": DecodeCase(M=1, layers=(layer_shape(16),), K=512, g=128, fused=("norm",)),
    "digits of two tokens, normalised and gated": DecodeCase(
        M=2,
        layers=(layer_shape(70, bias=True), layer_shape(70)),
        K=1216,
        g=64,
        dtype="float16",
        tile={"CLUSTERS": 2, "WARPS": 4, "K_WARPS": 2, "DIGITS": 3},
        fused=("norm", "gated"),
    ),
    "normalised and rounded": DecodeCase(
        M=2, layers=(layer_shape(19), layer_shape(40)), K=960, g=128, tile={"WARPS": 8, "DIGITS": 1}, fused=("norm",)
    ),
    "rounded and gated": DecodeCase(
        M=1,
        layers=(layer_shape(33), layer_shape(33, bias=True)),
        K=1024,
        g=128,
        tile={"CLUSTERS": 2, "WARPS": 4, "DIGITS": 1},
        fused=("norm", "gated"),
    ),
    "two tokens and parts of a step, normalised": DecodeCase(
        M=2, layers=(layer_shape(19), layer_shape(40)), K=1152, g=128, tile={"WARPS": 8}, fused=("norm",)
    ),
    "gated, pairs that do not fill the clusters": DecodeCase(
        M=5,
        layers=(layer_shape(33), layer_shape(33, bias=True)),
        K=1024,
        g=128,
        tile={"CLUSTERS": 2, "CLUSTER": 2},
        fused=("gated",),
    ),
    "gated, fewer rows than a row block": DecodeCase(
        M=1, layers=(layer_shape(5), layer_shape(5)), K=1024, g=128, tile={"CLUSTER": 2}, fused=("gated",)
    ),
    "residual": DecodeCase(
        M=3, layers=(layer_shape(40, bias=True),), K=1152, g=128, tile={"CLUSTERS": 2}, fused=("residual",)
    ),
    "normalised, with a residual": DecodeCase(
        M=2,
        layers=(layer_shape(19, planes=2),),
        K=1024,
        g=64,
        dtype="float16",
        tile={"WARPS": 4},
        fused=("norm", "residual"),
    ),
    "int8": DecodeCase(M=1, layers=(layer_shape(19),), K=1088, g=128, activation="int8", tile={"K_WARPS": 2}),
    "int8, three layers": DecodeCase(
        M=5,
        layers=(layer_shape(33, bias=True), layer_shape(5), layer_shape(17, bias=True)),
        K=704,
        g=128,
        activation="int8",
        tile={"TILES": 2, "CLUSTER": 2},
    ),
    "int8, groups of 64": DecodeCase(
        M=16, layers=(layer_shape(19),), K=1216, g=64, dtype="float16", activation="int8", tile={"K_WARPS": 2}
    ),
    "int8, groups of 256": DecodeCase(M=2, layers=(layer_shape(19, bias=True),), K=960, g=256, activation="int8"),
    "int8, a group a row": DecodeCase(M=2, layers=(layer_shape(19),), K=192, g=192, activation="int8"),
    "int8, the longest row": DecodeCase(M=1, layers=(layer_shape(2),), K=2**17 - 64, g=128, activation="int8"),
}


@dataclasses.dataclass(kw_only=True)
class Besides:
    """What a call takes for what it does besides, whether it does or not."""

    norm_weight: Tensor
    """[K]."""
    residual: Tensor
    """[M, N] of the first layer."""

    @classmethod
    def random(cls, case: DecodeCase) -> "Besides":
        dtype = getattr(torch, case.dtype)
        return cls(
            norm_weight=(torch.rand(case.K) + 0.5).to(dtype),
            residual=(torch.randn(case.M, case.layers[0].N) * 100).to(dtype),
        )

    def arguments(self, case: DecodeCase) -> list[Any]:
        """The last ones of a kernel of floats."""
        from ternarize.backends.tilelang.linear_decode import FUSED

        residual = [self.residual] if len(case.layers) == 1 else []
        return [self.norm_weight, *residual, EPS, sum(FUSED[name] for name in case.fused)]

    def assert_right(self, x: Tensor, case: DecodeCase, layers: Sequence[Operands]) -> None:
        """All that is computed in float64, and rounded where `ternarize.ops` says."""
        if "norm" in case.fused:
            x = x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * self.norm_weight.double()
            x = x.to(getattr(torch, case.dtype)).double()
        x = case.multiplied(x)
        y, *up = (layer.expected(x, case) for layer in layers)
        if "gated" in case.fused:
            y = torch.nn.functional.silu(y) * up[0]
        if "residual" in case.fused:
            y = y + self.residual.double()
        # Float32 rounds x the other way now and then, which is off by one unit.
        assert (layers[0].y == y.to(layers[0].y.dtype)).double().mean() > 0.9
        error = ROUNDING_ERROR[case.dtype]
        rtol, atol = error, 0.03 * error * float(y.abs().max())
        torch.testing.assert_close(layers[0].y.double(), y, rtol=rtol, atol=atol)
        if not up:
            return
        if "gated" in case.fused:
            assert layers[1].y.isnan().all()
        else:
            torch.testing.assert_close(layers[1].y.double(), up[0], rtol=rtol, atol=atol)
