"""Both halves of the update. Activations and gradients are small integers, so G is exact and results must be equal."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ternarize.backends.torch.update import NONFINITE_GRADIENT
from ternarize.config import Accumulator, Rule, TernaryConfig
from ternarize.layer import TernaryLinear
from ternarize.packing import pack, unpack
from tests.backends.kit import BACKENDS

on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)
for_every_rule = pytest.mark.parametrize(
    ("rule", "accumulator"), [("factored", "int8"), ("factored", "int4"), ("sign", "int8")]
)


def random_layer(
    N: int, K: int, group_size: int, rule: Rule, accumulator: Accumulator, device: str, train_exponents: bool = True
) -> TernaryLinear:
    """A trainable layer with accumulators over their whole range and exponents at both ends."""
    torch.manual_seed(N * K)
    config = TernaryConfig(
        group_size=group_size,
        rule=rule,
        accumulator=accumulator,
        train_exponents=train_exponents,
    )
    layer = TernaryLinear(K, N, False, config=config)
    assert layer.T_accum is not None
    layer.T_packed.copy_(pack(torch.randint(-1, 2, (N, K), dtype=torch.int8), layer.group_size))
    layer.E.copy_(torch.randint(-3, 3, layer.E.shape, dtype=torch.int8))
    layer.E[0], layer.E[-1] = 127, -126
    layer.T_accum.copy_(torch.randint(-127, 128, (N, K), dtype=torch.int8))
    if accumulator == "int4":
        low, high = torch.randint(-7, 8, (2, N, K))
        layer.T_accum.copy_((low & 15) | (high << 4))
    layer.to(device)
    layer.prepare_training()
    layer.rng.copy_(torch.tensor([2**32 - 5, 7, 2**31]))
    return layer


def integers(*shape: int, device: str, limit: int = 3) -> Tensor:
    return torch.randint(-limit, limit + 1, shape).float().to(device)


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def stage(backend: str, layers: list[TernaryLinear], grad_y: list[Tensor], x: Tensor) -> None:
    getattr(torch.ops.ternarize, f"update_stage_{backend}")(
        grad_y,
        x,
        [layer.T_packed for layer in layers],
        present([layer.row_log2 for layer in layers]),
        present([layer.col_log2 for layer in layers]),
        [layer.rng for layer in layers],
        present([layer.stage for layer in layers]),
        present([layer.stage_E for layer in layers]),
        present([layer.stage_row for layer in layers]),
        present([layer.stage_col for layer in layers]),
        [layer.status for layer in layers],
        layers[0].group_size,
        layers[0].rule,
    )


def commit_arguments(layer: TernaryLinear, refuse: int, lr: float) -> tuple[object, ...]:
    state = (layer.T_packed, layer.E, layer.T_accum, layer.T_momentum, layer.E_accum, layer.row_log2, layer.col_log2)
    staged = (layer.rng, layer.stage, layer.stage_E, layer.stage_row, layer.stage_col, layer.status)
    refused = torch.tensor([refuse], dtype=torch.int32, device=layer.E.device)
    rate = torch.full((1,), lr, device=layer.E.device)
    return (*state, *staged, refused, rate, 100, 2, layer.group_size, layer.rule)


def commit(backend: str, layer: TernaryLinear, *, refuse: int = 0, lr: float = 0.3) -> None:
    getattr(torch.ops.ternarize, f"update_commit_{backend}")(*commit_arguments(layer, refuse, lr))
    # As the optimizer does, when all layers are committed.
    layer.status.zero_()


def staged(layer: TernaryLinear) -> list[Tensor]:
    tensors = (layer.stage, layer.stage_E, layer.stage_row, layer.stage_col, layer.status)
    return [tensor.clone() for tensor in present(tensors)]


def assert_nothing_staged(layer: TernaryLinear) -> None:
    # The integers of the stage stay: the next micro-batch writes over them.
    _, *vectors = staged(layer)
    assert not any(vector.any() for vector in vectors)


def assert_equal(layer: TernaryLinear, other: TernaryLinear) -> None:
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def apply_arguments(
    layers: list[TernaryLinear], grad_y: list[Tensor], x: Tensor, *, refuse: int = 0, lr: float = 0.3
) -> tuple[object, ...]:
    names = ("T_packed", "E", "T_accum", "T_momentum", "E_accum", "row_log2", "col_log2", "rng", "status")
    state = [present([getattr(layer, name) for layer in layers]) for name in names]
    refused = torch.tensor([refuse], dtype=torch.int32, device=x.device)
    rate = torch.tensor(lr, device=x.device)
    first = layers[0]
    return (grad_y, x, *state, [refused] * len(layers), [rate] * len(layers), 100, 2, first.group_size, first.rule)


def apply_at_once(backend: str, *args: Any, **options: Any) -> None:
    getattr(torch.ops.ternarize, f"update_apply_{backend}")(*apply_arguments(*args, **options))


@on_every_backend
@for_every_rule
def test_both_halves_at_once_are_a_stage_and_a_commit(
    backend: str, device: str, rule: Rule, accumulator: Accumulator
) -> None:
    layers = [random_layer(N, 34, 32, rule, accumulator, device) for N in (4, 9)]
    expected = copy.deepcopy(layers)
    for _ in range(3):
        x, grad_y = integers(7, 34, device=device), [integers(7, N, device=device) for N in (4, 9)]
        apply_at_once(backend, layers, grad_y, x)
        stage("torch", expected, grad_y, x)
        for layer, other in zip(layers, expected, strict=True):
            commit("torch", other)
            other.rng[2] += 1
            assert_equal(layer, other)
            assert torch.equal(layer.rng, other.rng)
            assert layer.status.tolist() == [0, 0]


@on_every_backend
@for_every_rule
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton.*")
def test_at_once_a_bad_gradient_or_a_flag_changes_nothing_and_is_not_forgotten(
    backend: str, device: str, rule: Rule, accumulator: Accumulator
) -> None:
    layer = random_layer(5, 40, 32, rule, accumulator, device)
    before = copy.deepcopy(layer)
    x, grad_y = integers(4, 40, device=device), integers(4, 5, device=device)
    apply_at_once(backend, [layer], [grad_y], x, refuse=4)
    assert layer.status.tolist() == [0, 0]
    apply_at_once(backend, [layer], [grad_y * torch.nan], x)
    assert layer.status.tolist() == [NONFINITE_GRADIENT, 0]
    # As long as the optimizer has not seen it, a good gradient changes nothing either.
    apply_at_once(backend, [layer], [grad_y], x)
    assert layer.status.tolist() == [NONFINITE_GRADIENT, 0]
    assert_equal(layer, before)
    assert torch.equal(layer.rng, before.rng)


@on_every_backend
@for_every_rule
@pytest.mark.parametrize(
    ("N", "K", "group_size"),
    [
        (5, 130, 32),
        (3, 3, 128),
        (70, 64, 64),
        (2, 200, -1),
        (2, 1, 4),
        (3, 130, 12),
        (3, 256, -1),
        (2, 512, 256),
        (3, 48, 16),
    ],
)
def test_every_backend_steps_the_same_integers(
    backend: str, device: str, rule: Rule, accumulator: Accumulator, N: int, K: int, group_size: int
) -> None:
    layer = random_layer(N, K, group_size, rule, accumulator, device)
    expected, before = copy.deepcopy(layer), copy.deepcopy(layer)
    # The first step of `factored` only fills its statistics.
    for _ in range(3):
        for _ in range(2):
            x, grad_y = integers(2, 3, K, device=device), integers(2, 3, N, device=device)
            stage(backend, [layer], [grad_y], x)
            stage("torch", [expected], [grad_y], x)
        for got, wanted in zip(staged(layer), staged(expected), strict=True):
            assert torch.equal(got, wanted)
        commit(backend, layer)
        commit("torch", expected)
        assert_equal(layer, expected)
        assert_nothing_staged(layer)
        for each in (layer, expected):
            each.rng[2] += 1
    assert not torch.equal(layer.get_parameter("T_accum"), before.get_parameter("T_accum"))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layers_that_share_an_input_stage_as_they_do_alone(backend: str, device: str, dtype: torch.dtype) -> None:
    layers = [random_layer(N, 34, 32, "factored", "int8", device, train_exponents=False) for N in (4, 9)]
    expected = copy.deepcopy(layers)
    # Non-contiguous on purpose.
    x = integers(34, 7, device=device).t().to(dtype)
    grad_y = [integers(7, 2 * N, device=device)[:, ::2].to(dtype) for N in (4, 9)]
    for _ in range(2):
        stage(backend, layers, grad_y, x)
        for layer, gradient in zip(expected, grad_y, strict=True):
            stage("torch", [layer], [gradient], x)
        for layer, other in zip(layers, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(staged(layer), staged(other), strict=True))
            commit(backend, layer)
            commit("torch", other)
            assert_equal(layer, other)


@on_every_backend
@for_every_rule
def test_a_refused_step_changes_nothing_and_clears_the_stage(
    backend: str, device: str, rule: Rule, accumulator: Accumulator
) -> None:
    layer = random_layer(5, 40, 32, rule, accumulator, device)
    stage(backend, [layer], [integers(4, 5, device=device)], integers(4, 40, device=device))
    before = copy.deepcopy(layer)
    assert layer.status.tolist() == [0, 1]
    commit(backend, layer, refuse=1)
    assert_equal(layer, before)
    assert_nothing_staged(layer)


@on_every_backend
@for_every_rule
def test_a_layer_that_saw_no_gradient_is_left_alone(
    backend: str, device: str, rule: Rule, accumulator: Accumulator
) -> None:
    layer = random_layer(5, 40, 32, rule, accumulator, device)
    before = copy.deepcopy(layer)
    commit(backend, layer)
    assert_equal(layer, before)


@on_every_backend
@for_every_rule
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton.*")
@pytest.mark.parametrize("where", ["x", "grad_y"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_flagged(
    backend: str, device: str, rule: Rule, accumulator: Accumulator, where: str, value: float
) -> None:
    layer = random_layer(3, 20, 8, rule, accumulator, device)
    x, grad_y = integers(4, 20, device=device), integers(4, 3, device=device)
    (x if where == "x" else grad_y)[1, 2] = value
    stage(backend, [layer], [grad_y], x)
    assert layer.status.tolist() == [NONFINITE_GRADIENT, 1]
    # The flag outlives later micro-batches that are finite.
    stage(backend, [layer], [torch.zeros_like(grad_y)], torch.zeros_like(x))
    assert layer.status.tolist() == [NONFINITE_GRADIENT, 2]


@on_every_backend
@for_every_rule
@pytest.mark.parametrize("tokens", [0, 3])
def test_zero_gradients_stage_zeros(
    backend: str, device: str, rule: Rule, accumulator: Accumulator, tokens: int
) -> None:
    layer = random_layer(3, 20, 8, rule, accumulator, device)
    stage(backend, [layer], [torch.zeros(tokens, 3, device=device)], integers(tokens, 20, device=device))
    *sums, status = staged(layer)
    assert not any(tensor.any() for tensor in sums)
    assert status.tolist() == [0, 1]


@on_every_backend
def test_staged_integers_saturate(backend: str, device: str) -> None:
    layer = random_layer(2, 20, -1, "sign", "int8", device)
    assert layer.stage is not None
    layer.stage.fill_(127)
    layer.stage[1] = -127
    layer.status[1] = 1
    x, grad_y = torch.ones(1, 20, device=device), torch.tensor([[1.0, -1.0]], device=device)
    stage(backend, [layer], [grad_y], x)
    assert layer.stage.tolist() == [[127] * 20, [-127] * 20]


@on_every_backend
@for_every_rule
@pytest.mark.parametrize("tokens", [0, 5])
def test_the_first_micro_batch_writes_over_what_is_left(
    backend: str, device: str, rule: Rule, accumulator: Accumulator, tokens: int
) -> None:
    layer = random_layer(70, 40, 8, rule, accumulator, device)
    assert layer.stage is not None
    fresh = copy.deepcopy(layer)
    layer.stage.fill_(99)
    x, grad_y = integers(tokens, 40, device=device), integers(tokens, 70, device=device)
    for each in (layer, fresh):
        stage(backend, [each], [grad_y], x)
    assert all(torch.equal(got, wanted) for got, wanted in zip(staged(layer), staged(fresh), strict=True))


@on_every_backend
def test_the_clamped_gradient_never_leaves_four(backend: str, device: str) -> None:
    layer = random_layer(64, 64, -1, "factored", "int8", device, train_exponents=False)
    assert layer.row_log2 is not None
    assert layer.col_log2 is not None
    assert layer.stage is not None
    layer.row_log2.zero_()
    layer.col_log2.zero_()
    stage(backend, [layer], [torch.full((1, 64), 1e6, device=device)], torch.ones(1, 64, device=device))
    assert (layer.stage == 4).all()


@on_every_backend
def test_votes_follow_the_slope_of_their_group(backend: str, device: str) -> None:
    layer = random_layer(2, 12, 4, "sign", "int8", device)
    T = unpack(layer.T_packed, 12, 4).float()
    x, grad_y = integers(5, 12, device=device), integers(5, 2, device=device)
    stage(backend, [layer], [grad_y], x)
    assert layer.stage_E is not None
    slope = ((grad_y.t() @ x) * T).unflatten(1, (3, 4)).sum(2)
    assert torch.equal(layer.stage_E.float(), slope.sign())


@on_every_backend
@for_every_rule
def test_the_update_ops_pass_opcheck(backend: str, device: str, rule: Rule, accumulator: Accumulator) -> None:
    layer = random_layer(3, 20, 8, rule, accumulator, device)
    ops = torch.ops.ternarize
    torch.library.opcheck(
        getattr(ops, f"update_stage_{backend}"),
        (
            [integers(4, 3, device=device)],
            integers(4, 20, device=device),
            [layer.T_packed],
            present([layer.row_log2]),
            present([layer.col_log2]),
            [layer.rng],
            present([layer.stage]),
            present([layer.stage_E]),
            present([layer.stage_row]),
            present([layer.stage_col]),
            [layer.status],
            layer.group_size,
            rule,
        ),
    )
    torch.library.opcheck(getattr(ops, f"update_commit_{backend}"), commit_arguments(layer, 0, 0.3))
    at_once = apply_arguments([layer], [integers(4, 3, device=device)], integers(4, 20, device=device))
    torch.library.opcheck(getattr(ops, f"update_apply_{backend}"), at_once)
