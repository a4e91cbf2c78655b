"""Every operator of the namespace ``torch.ops.ternarize``: schema and fake implementation; autograd is beside it.

Semantic ops are what layers call and Dynamo sees. Layers that share their input (q, k and v; gate and up) are one call,
so every per-layer argument is a list:

    linear          y_i = x · W_iᵀ + bias_i, differentiable in x; with activation "int8", of x rounded to int8
    linear_train    the same; its backward also calls what ``apply`` says: update_stage, update_apply or update_keep
    grad_input      sum over i of grad_y_i · W_i
    update_stage    adds the integers of one micro-batch's gradient to each layer's stage
    update_apply    both halves of the update at once, without a stage that outlives it
    update_keep     keeps copies of grad_y and x on each layer
    update_commit   applies one layer's stage to its integers, or refuses it
    dequantize      the dense weight, for code that wants one
    check_finite    raises a bit of a status tensor if a tensor is not finite
    guard_loss      a copy of the loss, whose backward raises a bit of a status tensor if the loss is not finite

Lowered ops, ``<op>_tilelang``, ``<op>_triton`` and ``<op>_torch``, are what `ternarize.passes.lower_ternary` puts in
their place: each calls the function of the same name in ``ternarize.backends.<backend>``. ``linear_tilelang`` and
``linear_int8_tilelang`` also take a list ``status``, before ``group_size``: empty, or one tensor a layer, whose output
bit the kernel raises if it writes a value that is not finite. ``linear_tilelang`` can also do what is around a call of
a few tokens, of which all but ``rounds`` is found by `ternarize.passes.fuse_decode`:

    norm_weight    [K] of x's dtype: x is normalised by its root mean square first, and multiplied by it
    norm_eps       float, added to the mean square
    rounds         x, normalised or not, is rounded to int8 as the quantiser does: what ``linear_int8`` multiplies
    residual       [..., N] of x's dtype, of one layer: added to y
    gated          of two layers with as many rows: the one result is silu(y_0) · y_1

All in float32, rounded once: to x's dtype what is multiplied, and what is returned.

With activation "int8", ``linear`` and ``linear_train`` are lowered to the quantiser (`ternarize.activation`), as
ordinary ops that Inductor fuses into what comes before, and ``linear_int8``; a few tokens on TileLang to one call that
``rounds``. The rounding is passed straight through in backward, as in BitNet: grad_x is that of ``linear``, and the
update takes x as it was multiplied, rounded.

Arguments, by name, with the letters of `ternarize.packing`:

    x              [..., K] floating                      grad_y         [..., N] floating, dtype of x
    T_packed       uint8 [N, B] or [P, N, B]              E              int8 [N, G]
    E_mantissa     integer, broadcasts to [N, G]          bias           int32 [N]
    bias_exponent  int8 [1]                               anchor         floating [0], requires_grad
    q              int8 [..., K]: x rounded               scale          float32 [..., 1]: x is about q · scale
    row_log2       int16 [N]                              col_log2       int16 [K]
    T_accum        int8 [N, K]                            T_momentum     int8 [N, K]
    E_accum        int8 [N, G]                            rng            int64 [3]: seed, layer, step
    stage          int8 [N, K]: sum of u of as many       stage_E        int8 [N, G]: sum of exponent votes
                   micro-batches as status counts
    stage_row      float32 [N]: sum of G² along K         stage_col      float32 [K]: sum of G² along N
    status         int32 [2]: bits of what was not finite, staged micro-batches
    refuse         int32 [1]: not 0 means drop what is staged and change nothing else
    lr             float32, 1 element: learning rate      apply          when the state changes: `TernaryOptimizer`

Tensors that a rule does not need are left out: lists are empty, single tensors are None.
"""

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ternarize import kept
from ternarize.activation import quantize_activation
from ternarize.config import Kernels
from ternarize.errors import ShapeError, TernarizeError
from ternarize.packing import dequantize

BACKENDS = ("tilelang", "triton", "torch")

_WEIGHTS = "Tensor[] T_packed, Tensor[] E, Tensor?[] E_mantissa"
_BIAS = "Tensor?[] bias, Tensor?[] bias_exponent"
_PLANES = "Tensor[] T_accum, Tensor[] T_momentum, Tensor[] E_accum"
_TRAIN_STATE = "Tensor[] row_log2, Tensor[] col_log2, Tensor[] rng"
_STAGE = "Tensor[] stage, Tensor[] stage_E, Tensor[] stage_row, Tensor[] stage_col, Tensor[] status"
_STAGE_MUTATED = (
    "Tensor(a!)[] stage, Tensor(b!)[] stage_E, Tensor(c!)[] stage_row, Tensor(d!)[] stage_col, Tensor(e!)[] status"
)

_LINEAR = f"(Tensor x, {_WEIGHTS}, {_BIAS}, int group_size) -> Tensor[]"
_FUSED = "bool rounds=False, Tensor? norm_weight=None, float norm_eps=0.0, Tensor? residual=None, bool gated=False"
_LINEAR_INT8 = f"(Tensor q, Tensor scale, {_WEIGHTS}, {_BIAS}, int group_size, ScalarType dtype) -> Tensor[]"
_STATUS = "Tensor(a!)[] status"
_GRAD_INPUT = f"(Tensor[] grad_y, {_WEIGHTS}, int in_features, int group_size) -> Tensor"
_UPDATE_STAGE = (
    f"(Tensor[] grad_y, Tensor x, Tensor[] T_packed, {_TRAIN_STATE}, {_STAGE_MUTATED}, int group_size, str rule) -> ()"
)
_UPDATE_COMMIT = (
    "(Tensor(a!) T_packed, Tensor(b!) E, Tensor(c!) T_accum, Tensor(d!)? T_momentum, Tensor(e!)? E_accum, "
    "Tensor(f!)? row_log2, Tensor(g!)? col_log2, Tensor rng, Tensor stage, Tensor(h!)? stage_E, "
    "Tensor(i!)? stage_row, Tensor(j!)? stage_col, Tensor status, Tensor refuse, Tensor lr, int threshold, "
    "int exponent_threshold, int group_size, str rule) -> ()"
)
_UPDATE_APPLY = (
    "(Tensor[] grad_y, Tensor x, Tensor(a!)[] T_packed, Tensor(b!)[] E, Tensor(c!)[] T_accum, Tensor(d!)[] T_momentum, "
    "Tensor(e!)[] E_accum, Tensor(f!)[] row_log2, Tensor(g!)[] col_log2, Tensor(h!)[] rng, Tensor(i!)[] status, "
    "Tensor[] refuse, Tensor[] lr, int threshold, int exponent_threshold, int group_size, str rule) -> ()"
)

#: Stem of an op: its schema, the module of each backend that holds it, the backends that do.
_LOWERED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "linear": (_LINEAR, "linear", BACKENDS),
    "linear_int8": (_LINEAR_INT8, "linear_int8", BACKENDS),
    "grad_input": (_GRAD_INPUT, "grad_input", ("triton", "torch")),
    "update_stage": (_UPDATE_STAGE, "update", BACKENDS),
    "update_commit": (_UPDATE_COMMIT, "update", ("triton", "torch")),
    "update_apply": (_UPDATE_APPLY, "update", BACKENDS),
}


#: Stems whose TileLang kernels report what is not finite: how many arguments of their ops come after ``status``.
_GUARDED = {"linear": 1, "linear_int8": 2}


def lowered(stem: str, backend: str) -> torch._ops.OpOverload:
    """The op that runs ``stem`` with the kernels of ``backend``."""
    overload: torch._ops.OpOverload = getattr(torch.ops.ternarize, f"{stem}_{backend}").default
    return overload


def with_status(stem: str, backend: str, args: Sequence[Any], status: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Arguments of a lowered op, with ``status`` if it takes that; empty, no layer is guarded."""
    if stem not in _GUARDED or backend != "tilelang":
        return tuple(args)
    at = len(args) - _GUARDED[stem]
    return (*args[:at], list(status), *args[at:])


def kernel(stem: str, backend: str) -> Callable[..., Any]:
    """The host function of ``stem`` in ``backend``, imported when it is first asked for."""
    module = importlib.import_module(f"ternarize.backends.{backend}.{_LOWERED[stem][1]}")
    function: Callable[..., Any] = getattr(module, stem)
    return function


def _define(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag
) -> None:
    torch.library.define(f"ternarize::{name}", schema, tags=(torch.Tag.needs_fixed_stride_order, *tags))
    torch.library.impl(f"ternarize::{name}", "default", implementation)
    torch.library.register_fake(f"ternarize::{name}", fake)


# Fake implementations: shapes, dtypes and the errors that a user can cause.


def _check_input(x: Tensor, T_packed: Sequence[Tensor]) -> None:
    if not x.is_floating_point():
        raise ShapeError(f"a ternary layer got {x.dtype} input: it needs a floating-point tensor")
    for packed in T_packed:
        if packed.shape[-1] != (x.shape[-1] + 3) // 4:
            raise ShapeError(
                f"input of shape {list(x.shape)} does not fit a ternary layer of {4 * packed.shape[-1]} in_features "
                "(or up to 3 fewer): its last dimension must be in_features"
            )


def _linear_fake(x: Tensor, T_packed: Sequence[Tensor], *_: Any, gated: bool = False, **__: Any) -> list[Tensor]:
    _check_input(x, T_packed)
    return [x.new_empty((*x.shape[:-1], packed.shape[-2])) for packed in (T_packed[:1] if gated else T_packed)]


def _linear_int8_fake(q: Tensor, scale: Tensor, T_packed: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [q.new_empty((*q.shape[:-1], packed.shape[-2]), dtype=rest[-1]) for packed in T_packed]


def _linear_train_fake(x: Tensor, anchor: Tensor, T_packed: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return _linear_fake(x, T_packed)


def _grad_input_fake(
    grad_y: Sequence[Tensor], T_packed: object, E: object, E_mantissa: object, in_features: int, group_size: int
) -> Tensor:
    return grad_y[0].new_empty((*grad_y[0].shape[:-1], in_features))


def _nothing(*_: Any) -> None:
    pass


_FAKES: dict[str, Callable[..., Any]] = {
    "linear": _linear_fake,
    "linear_int8": _linear_int8_fake,
    "grad_input": _grad_input_fake,
    "update_stage": _nothing,
    "update_commit": _nothing,
    "update_apply": _nothing,
}


# Implementations: lowered ops call their kernel, semantic ops choose one.


@functools.cache
def _mutated(schema: str) -> tuple[int, ...]:
    """Positions of the arguments that an op of this schema mutates."""
    return tuple(i for i, argument in enumerate(torch._C.parse_schema("f" + schema).arguments) if argument.is_write)


def _run(stem: str, backend: str, mutated: tuple[int, ...], *args: Any, **fused: Any) -> Any:
    # Kernels choose their own precision: autocast would round the reference's float32 operands.
    with torch._C._DisableAutocast():
        result = kernel(stem, backend)(*args, **fused)
    # Kernels write past autograd's version counters, which is how a commit between forward and backward is noticed.
    written = itertools.chain.from_iterable(
        args[i] if isinstance(args[i], list | tuple) else (args[i],) for i in mutated
    )
    torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])
    return result


for _stem, (_schema, _, _backends) in _LOWERED.items():
    for _backend in _backends:
        _guarded = _stem in _GUARDED and _backend == "tilelang"
        _its_schema = _schema.replace("int group_size", f"{_STATUS}, int group_size") if _guarded else _schema
        if (_stem, _backend) == ("linear", "tilelang"):
            _its_schema = _its_schema.replace("int group_size", f"int group_size, *, {_FUSED}")
        _define(
            f"{_stem}_{_backend}",
            _its_schema,
            functools.partial(_run, _stem, _backend, _mutated(_its_schema)),
            _FAKES[_stem],
        )


def _functionalize(op: torch._ops.OpOverload, status: int, ctx: Any, *args: Any) -> list[Tensor]:
    """Trace a guarded op where AOTAutograd makes a graph functional: without status, it mutates nothing.

    Inductor takes an op that returns a list and mutates an argument, as this one is when a pass has put it in, only if
    the op says itself how it is made functional.
    """
    if args[status]:
        raise TernarizeError(f"{op} takes status tensors from `GuardOutputPass` only: pass an empty list")
    with ctx.redispatch_to_next():
        outputs: list[Tensor] = op(*ctx.unwrap_tensors(args))
    wrapped: list[Tensor] = ctx.wrap_tensors(outputs)
    return wrapped


for _stem, _after in _GUARDED.items():
    _op = lowered(_stem, "tilelang")
    _op.py_functionalize_impl(functools.partial(_functionalize, _op, -1 - _after))


def _eager(stem: str, *args: Any) -> Any:
    """Run a semantic op now, with the kernel that its tensors and the environment ask for."""
    from ternarize.backends.select import eager_backend

    return _run(stem, eager_backend(stem, args), _mutated(_LOWERED[stem][0]), *args)


for _stem in ("grad_input", "update_stage", "update_commit", "update_apply"):
    _define(_stem, _LOWERED[_stem][0], functools.partial(_eager, _stem), _FAKES[_stem])


#: Activation of a layer: the lowered op that multiplies it.
LINEAR_STEM = {"float": "linear", "int8": "linear_int8"}


def linear_now(policy: Kernels | None, x: Tensor, *arguments: Any) -> list[Tensor]:
    """Run ``linear`` outside of graphs, unguarded: in ``auto`` with Triton or torch.

    Args:
        policy: which kernels to use; None for what the environment asks for.
        x: as of ``linear``.
        arguments: the others of ``linear``, in their order.
    """
    from ternarize.backends.select import eager_backend

    *weights, _, group_size, activation, _ = arguments
    _check_input(x, weights[0])
    stem = LINEAR_STEM[activation]
    args: tuple[Any, ...] = (x, *weights, group_size)
    backend = eager_backend(stem, args, policy)
    if activation == "int8":
        args = (*quantize_activation(x), *weights, group_size, x.dtype)
    outputs: list[Tensor] = _run(stem, backend, (), *with_status(stem, backend, args))
    return outputs


_define(
    "linear",
    f"(Tensor x, {_WEIGHTS}, {_BIAS}, Tensor[] status, int group_size, str activation, bool tilelang) -> Tensor[]",
    functools.partial(linear_now, None),
    _linear_fake,
)


def _linear_train_eager(
    x: Tensor,
    anchor: Tensor,
    T_packed: list[Tensor],
    E: list[Tensor],
    E_mantissa: list[Tensor | None],
    bias: list[Tensor | None],
    bias_exponent: list[Tensor | None],
    *rest: Any,
) -> list[Tensor]:
    group_size, activation, _, _ = rest[-4:]
    return linear_now(None, x, T_packed, E, E_mantissa, bias, bias_exponent, [], group_size, activation, False)


_define(
    "linear_train",
    f"(Tensor x, Tensor anchor, {_WEIGHTS}, {_BIAS}, {_PLANES}, {_TRAIN_STATE}, {_STAGE}, Tensor[] refuse, "
    "Tensor[] lr, int threshold, int exponent_threshold, int group_size, str activation, str rule, str apply) "
    "-> Tensor[]",
    _linear_train_eager,
    _linear_train_fake,
)


def _dequantize_fake(
    T_packed: Tensor, E: Tensor, E_mantissa: Tensor | None, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    return T_packed.new_empty((T_packed.shape[-2], in_features), dtype=dtype)


_define(
    "dequantize",
    "(Tensor T_packed, Tensor E, Tensor? E_mantissa, int in_features, int group_size, ScalarType dtype) -> Tensor",
    dequantize,
    _dequantize_fake,
)


def _check_finite(value: Tensor, given: Tensor | None, status: Tensor, bit: int) -> None:
    """Raise ``bit`` in status[0] if ``value`` is not finite though ``given``, if any, is."""
    broken = ~torch.isfinite(value).all()
    if given is not None:
        broken &= torch.isfinite(given).all()
    status[0] |= broken.to(status.device, torch.int32, non_blocking=True) * bit


_define("check_finite", "(Tensor value, Tensor? given, Tensor(a!) status, int bit) -> ()", _check_finite, _nothing)


def _guard_loss(loss: Tensor, status: Tensor, bit: int) -> Tensor:
    return loss.clone()


def _guard_loss_fake(loss: Tensor, status: Tensor, bit: int) -> Tensor:
    return torch.empty_like(loss)


_define("guard_loss", "(Tensor loss, Tensor status, int bit) -> Tensor", _guard_loss, _guard_loss_fake)


def _update_keep(grad_y: Sequence[Tensor], x: Tensor, rng: Sequence[Tensor], status: Sequence[Tensor]) -> None:
    # Copies: what a compiled graph passes here may be memory that it uses again.
    inputs = x.reshape(-1, x.shape[-1]).clone()
    for gradient, layer_rng, layer_status in zip(grad_y, rng, status, strict=True):
        kept.keep(layer_rng, gradient.reshape(-1, gradient.shape[-1]).clone(), inputs)
        layer_status[1] += 1


# Replaying a CUDA graph would keep nothing: Inductor leaves this op out of them.
_define(
    "update_keep",
    "(Tensor[] grad_y, Tensor x, Tensor[] rng, Tensor(a!)[] status) -> ()",
    _update_keep,
    _nothing,
    torch.Tag.cudagraph_unsafe,
)

# Last: it registers the derivatives of the ops above.
from ternarize import autograd as autograd  # noqa: E402
