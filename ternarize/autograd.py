"""Derivatives of the operators of `ternarize.ops`, which imports this when they are defined."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize.activation import dequantize_activation, quantize_activation
from ternarize.errors import TernarizeError


def _no_gradients(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """None for every input, in the structure that torch.library wants: a list of tensors gives a list of None."""
    return tuple(
        [None] * len(given) if isinstance(given, list) and all(isinstance(t, Tensor) for t in given) else None
        for given in inputs
    )


def _save(ctx: Any, x: Tensor, T_packed: list[Tensor], E: list[Tensor], E_mantissa: list[Tensor | None]) -> None:
    # Version-checked: a commit between forward and backward must be an error.
    ctx.save_for_backward(x, *T_packed, *E, *E_mantissa)
    ctx.layers, ctx.in_features = len(T_packed), x.shape[-1]
    # Zeros in place of a missing gradient would be a micro-batch of its own to a layer that must stay as it is.
    ctx.set_materialize_grads(False)


def _with_gradient(ctx: Any, grad_y: list[Tensor | None], state: Sequence[list[Tensor]]) -> tuple[Tensor, list[Any]]:
    """x; then grad_y, T_packed, E, E_mantissa and ``state``, without the layers whose output got no gradient.

    Those are layers of a merged call whose output was not used, or only outside of autograd.
    """
    # Read once: activation checkpointing allows no second look.
    x, *saved = ctx.saved_tensors
    weights = [saved[start : start + ctx.layers] for start in range(0, len(saved), ctx.layers)]
    live = [i for i, gradient in enumerate(grad_y) if gradient is not None]
    return x, [[values[i] for i in live] if values else [] for values in (grad_y, *weights, *state)]


def _grad_input(ctx: Any, grad_y: list[Tensor], *weights: list[Any]) -> Tensor | None:
    if not (grad_y and ctx.needs_input_grad[0]):
        return None
    grad_x: Tensor = torch.ops.ternarize.grad_input(grad_y, *weights, ctx.in_features, ctx.group_size)
    return grad_x


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, T_packed, E, E_mantissa, *_, ctx.group_size, _, _ = inputs
    # x itself is not needed: an empty stand-in keeps `_save` one function.
    _save(ctx, x.new_empty(0, x.shape[-1]), T_packed, E, E_mantissa)
    ctx.no_gradients = _no_gradients(inputs[1:])


def _linear_backward(ctx: Any, grad_y: list[Tensor | None]) -> tuple[Any, ...]:
    _, per_layer = _with_gradient(ctx, grad_y, ())
    return _grad_input(ctx, *per_layer), *ctx.no_gradients


torch.library.register_autograd("ternarize::linear", _linear_backward, setup_context=_linear_setup)


def _linear_train_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, T_packed, E, E_mantissa, _, _, *state = inputs[:20]
    *ctx.thresholds, ctx.group_size, ctx.activation, ctx.rule, ctx.update_mode = inputs[20:]
    _save(ctx, x, T_packed, E, E_mantissa)
    # Not version-checked: backward itself mutates these, which a tied layer and two live graphs must survive.
    ctx.state = state
    ctx.no_gradients = _no_gradients(inputs[1:])


def _linear_train_backward(ctx: Any, grad_y: list[Tensor | None]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise TernarizeError(
            "create_graph=True reached a trainable ternary layer, whose update has no second derivative: "
            "call eval() or freeze on the layers that a gradient penalty goes through"
        )
    x, (gradients, T_packed, E, E_mantissa, *state) = _with_gradient(ctx, grad_y, ctx.state)
    grad_x = _grad_input(ctx, gradients, T_packed, E, E_mantissa)
    if gradients:
        if ctx.activation == "int8":
            x = dequantize_activation(*quantize_activation(x), x.dtype)
        _update(ctx, gradients, x, T_packed, E, *state)
    return grad_x, *ctx.no_gradients


def _update(
    ctx: Any,
    grad_y: list[Tensor],
    x: Tensor,
    T_packed: list[Tensor],
    E: list[Tensor],
    T_accum: list[Tensor],
    T_momentum: list[Tensor],
    E_accum: list[Tensor],
    row_log2: list[Tensor],
    col_log2: list[Tensor],
    rng: list[Tensor],
    *stage_and_rate: list[Tensor],
) -> None:
    """What is done with a gradient in backward, as the layers' optimizer wants it."""
    *stage, status, refuse, lr = stage_and_rate
    ops, statistics, rule = torch.ops.ternarize, (row_log2, col_log2), (ctx.group_size, ctx.rule)
    if ctx.update_mode == "hooks":
        ops.update_keep(grad_y, x, rng, status)
    elif ctx.update_mode == "backward":
        planes = (T_packed, E, T_accum, T_momentum, E_accum, *statistics, rng, status)
        ops.update_apply(grad_y, x, *planes, refuse, lr, *ctx.thresholds, *rule)
    else:
        ops.update_stage(grad_y, x, T_packed, *statistics, rng, *stage, status, *rule)


torch.library.register_autograd("ternarize::linear_train", _linear_train_backward, setup_context=_linear_train_setup)


def _grad_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, T_packed, E, E_mantissa, _, ctx.group_size = inputs
    ctx.layers = len(T_packed)
    ctx.save_for_backward(*T_packed, *E, *E_mantissa)
    ctx.no_gradients = _no_gradients(inputs[1:])


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    n, saved = ctx.layers, ctx.saved_tensors
    no_bias = [None] * n
    weights = (saved[:n], saved[n : 2 * n], saved[2 * n :])
    grad_y = torch.ops.ternarize.linear(grad, *weights, no_bias, no_bias, [], ctx.group_size, "float", False)
    return grad_y, *ctx.no_gradients


torch.library.register_autograd("ternarize::grad_input", _grad_input_backward, setup_context=_grad_input_setup)


def _guard_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    loss, ctx.status, ctx.bit = inputs
    ctx.save_for_backward(loss)


def _guard_loss_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (loss,) = ctx.saved_tensors
    torch.ops.ternarize.check_finite(loss, None, ctx.status, ctx.bit)
    return grad, None, None


torch.library.register_autograd("ternarize::guard_loss", _guard_loss_backward, setup_context=_guard_loss_setup)
