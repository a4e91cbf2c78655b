"""What calls of a few tokens should do besides, and which round x themselves."""

import dataclasses

import pytest
import torch

pytest.importorskip("tilelang", reason="TileLang is for Linux")

from ternarize.backends.tilelang.linear import Fusible, fusible, rounds

K, N = 64, 128

NOTHING, ALL = (Fusible(norm=does, gate=does, residual=does) for does in (False, True))
NO_RESIDUAL, NO_NORM = dataclasses.replace(ALL, residual=False), dataclasses.replace(ALL, norm=False)
NEITHER = dataclasses.replace(NO_NORM, residual=False)


@pytest.mark.parametrize(
    ("shape", "features", "group_size", "dtype", "expected"),
    [
        ((1, 2, K), (N,), 64, torch.bfloat16, NO_RESIDUAL),
        ((3, K), (N,), 64, torch.bfloat16, NEITHER),
        ((2, 8, K), (N, N), -1, torch.float16, NO_NORM),
        ((17, K), (N,), 64, torch.bfloat16, NOTHING),
        ((0, K), (N,), 64, torch.bfloat16, NOTHING),
        ((1, K), (N,), 64, torch.float32, NOTHING),
        ((1, K), (N,), 32, torch.bfloat16, NOTHING),
        ((1, 2**14), (N,), 128, torch.bfloat16, NO_RESIDUAL),
        ((2, 2**14), (N,), 128, torch.bfloat16, NEITHER),
        ((4, K), (N,), 64, torch.bfloat16, NEITHER),
        ((5, K), (N,), 64, torch.bfloat16, NO_NORM),
    ],
    ids=str,
)
def test_which_calls_can_do_more(
    shape: tuple[int, ...], features: tuple[int, ...], group_size: int, dtype: torch.dtype, expected: Fusible
) -> None:
    T_packed = [torch.empty(n, shape[-1] // 4, dtype=torch.uint8, device="meta") for n in features]
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert fusible(x, T_packed, [None] * len(features), group_size) == expected


@pytest.mark.parametrize(
    ("shape", "planes", "group_size", "dtype", "expected"),
    [
        ((1, 57344), 1, 128, torch.bfloat16, True),
        ((2, 1, 14336), 1, 128, torch.float16, True),
        ((1, K), 1, -1, torch.bfloat16, True),
        ((3, K), 1, -1, torch.bfloat16, False),
        ((17, K), 1, -1, torch.bfloat16, False),
        ((0, K), 1, 64, torch.bfloat16, False),
        ((1, K), 1, 64, torch.float32, False),
        ((1, K), 1, 32, torch.bfloat16, False),
        ((1, K), 2, 64, torch.bfloat16, False),
    ],
    ids=str,
)
def test_which_calls_round_themselves(
    shape: tuple[int, ...], planes: int, group_size: int, dtype: torch.dtype, expected: bool
) -> None:
    rows = (planes, N) if planes > 1 else (N,)
    packed = torch.empty(*rows, shape[-1] // 4, dtype=torch.uint8, device="meta")
    assert rounds(torch.empty(shape, dtype=dtype, device="meta"), [packed], [None], group_size) == expected
