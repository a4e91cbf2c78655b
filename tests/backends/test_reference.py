"""backends/torch against its definition, spelled out in float64 from unpacked trits."""

import pytest
import torch
from torch import Tensor

from ternarize.backends.torch.update import (
    NO_STATISTICS,
    exponent_rule,
    factored_rule,
    merge_statistics,
    normalisers,
    sign_rule,
    sum_groups,
)
from ternarize.packing import row_strips, unpack
from tests.backends.kit import assert_close, grad_input, linear, random_weights


def dense(T_packed: Tensor, E: Tensor, K: int, group_size: int) -> Tensor:
    """float64 [N, K], one weight at a time."""
    T = unpack(T_packed, K, group_size)
    size = K if group_size == -1 else group_size
    weight = torch.empty(T.shape, dtype=torch.float64)
    for n in range(T.shape[0]):
        for k in range(K):
            weight[n, k] = int(T[n, k]) * 2.0 ** int(E[n, k // size])
    return weight


@pytest.mark.parametrize("group_size", [4, 12, 32, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_reference_linear_and_grad_input_are_dense_products(group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = random_weights(7, 37, group_size, bias=True)
    assert layer.bias is not None
    weight = dense(layer.T_packed, layer.E, 37, group_size)
    x, grad_y = torch.randn(5, 37).to(dtype), torch.randn(5, 7).to(dtype)
    y = linear("torch", x, [layer], group_size)[0]
    grad_x = grad_input("torch", [grad_y], [layer], 37, group_size)
    if dtype == torch.float64:
        torch.testing.assert_close(y, x @ weight.t() + layer.bias.double() * 2.0**-30, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad_x, grad_y @ weight)
    else:
        assert_close(y, x.double() @ weight.t() + layer.bias.double() * 2.0**-30)
        assert_close(grad_x, grad_y.double() @ weight)


def test_planes_are_digits_of_base_three() -> None:
    layer = random_weights(4, 20, 8, planes=3)
    high, middle, low = (dense(plane, layer.E, 20, 8) for plane in layer.T_packed)
    x = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(linear("torch", x, [layer], 8)[0], x @ (9 * high + 3 * middle + low).t())


def test_strips_cover_every_row_once() -> None:
    rows = [row for strip in row_strips(1000, 50_000) for row in range(strip.start, strip.stop)]
    assert rows == list(range(1000))
    assert len(list(row_strips(1000, 50_000))) > 1


def test_normalisers_are_the_factored_second_moment() -> None:
    row_log2, col_log2 = torch.tensor([0, 256, -512], dtype=torch.int16), torch.tensor([512, -256], dtype=torch.int16)
    r, c = torch.tensor([1.0, 2.0, 0.25]), torch.tensor([4.0, 0.5])
    row, col = normalisers(row_log2, col_log2)
    torch.testing.assert_close(row[:, None] * col, (r.mean() / (r[:, None] * c)).sqrt())


def test_no_statistics_normalise_to_zero_and_are_filled_by_the_first_step() -> None:
    unknown = torch.full((3,), NO_STATISTICS, dtype=torch.int16)
    assert not normalisers(unknown, unknown)[0].any()
    assert merge_statistics(unknown, torch.tensor([1.0, 4.0, 0.5])).tolist() == [0, 512, -256]


def test_merging_statistics_averages_in_the_linear_domain() -> None:
    merged = merge_statistics(torch.tensor([0, 0], dtype=torch.int16), torch.tensor([1.0, 21.0]))
    assert merged.tolist() == [0, 256]


def test_sum_groups_ends_with_the_tail() -> None:
    assert sum_groups(torch.arange(10.0)[None], 4).tolist() == [[6.0, 22.0, 17.0]]
    assert sum_groups(torch.arange(10.0)[None], -1).tolist() == [[45.0]]


def test_factored_rule_carries_the_remainder_over_a_step() -> None:
    # Momentum 64, at lr 0.1: an accumulator loses 0.1 · 254 = 25.4, rounded up here, as bits of zero do.
    T, accum = torch.tensor([[0, 1, -1]], dtype=torch.int32), torch.tensor([[-110, -110, -110]], dtype=torch.int8)
    momentum, zero = torch.full((1, 3), 64, dtype=torch.int8), torch.zeros(1, 3, dtype=torch.int32)
    # Ones of two micro-batches.
    count, lr = torch.tensor(2, dtype=torch.int32), torch.tensor(0.1)
    new_T, new_accum, new_momentum = factored_rule(T, accum, momentum, zero + 2, count, lr, zero, zero)
    assert new_T.tolist() == [[-1, 0, -1]]
    # -110 - 26 = -136, and 254 back for a step taken; where T is at its end the accumulator stays at its own.
    assert new_accum.tolist() == [[118, 118, -127]]
    assert new_momentum is not None
    assert new_momentum.tolist() == [[64, 64, 64]]


def test_factored_rule_in_nibbles_steps_beyond_theta_only() -> None:
    # Low nibble: accumulator 7, which is theta; high nibble: momentum 0. Then momentum -4 at lr 4/14: one unit more.
    T, zero = torch.tensor([[0]], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    one = torch.tensor(1, dtype=torch.int32)
    packed = torch.tensor([[7]], dtype=torch.int8)
    assert factored_rule(T, packed, None, zero, one, torch.tensor(0.1), zero, zero)[0].tolist() == [[0]]
    packed = torch.tensor([[7 | (-4 << 4)]], dtype=torch.int8)
    new_T, new_packed, _ = factored_rule(T, packed, None, zero - 1, one, torch.tensor(1 / 14), zero, zero)
    assert new_T.tolist() == [[1]]
    assert new_packed.tolist() == [[((8 - 14) & 15) - 64]]


def test_sign_rule_steps_against_the_votes_and_returns_to_zero() -> None:
    T = torch.tensor([[0, 0, 1, 0]], dtype=torch.int32)
    accum = torch.tensor([[-15, 15, 15, 3]], dtype=torch.int8)
    votes = torch.tensor([[1, -1, -1, 1]], dtype=torch.int32)
    new_T, new_accum = sign_rule(T, accum, votes, torch.tensor(1.0), 16, torch.zeros_like(votes))
    assert new_T.tolist() == [[-1, 1, 1, 0]]
    assert new_accum.tolist() == [[0, 0, 0, 2]]


def test_exponents_stop_at_both_ends() -> None:
    E = torch.tensor([[127, -126, 3]], dtype=torch.int8)
    votes = torch.tensor([[-2, 2, 1]], dtype=torch.int8)
    new_E, accum = exponent_rule(E, torch.zeros_like(E), votes, 2)
    assert new_E.tolist() == [[127, -126, 3]]
    assert accum.tolist() == [[0, 0, -1]]
