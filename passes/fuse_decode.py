"""Let TileLang's kernel for a few tokens do what comes right before and right after it."""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, fx

from ternarize.ops import lowered
from ternarize.passes.base import GraphPass
from ternarize.passes.lower_ternary import value_of

aten, prims = torch.ops.aten, torch.ops.prims


class FuseDecodePass(GraphPass):
    """Put the norm before a call, and the gate or the residual after it, into the call itself.

    Runs on the functional graph after autograd, in inference, after `LowerTernaryPass`: only then it is known which
    calls are TileLang's. For a few tokens small kernels between them are much of the time. What a call takes is said
    by `ternarize.backends.tilelang.linear.fusible`. Norms are recognised as transformers writes them,

        f: "f32[2, 1, K]" = prims.convert_element_type(h, torch.float32)
        mean: "f32[2, 1, 1]" = aten.mean(aten.pow(f, 2), [-1], True)
        n: "bf16[2, 1, K]" = prims.convert_element_type(f * aten.rsqrt(mean + eps), torch.bfloat16)
        x: "bf16[2, 1, K]" = weight * n

    and as ``torch.nn.RMSNorm`` becomes one, which multiplies by the weight before it rounds. The call rounds once
    either way, as Inductor's own kernel would. A gate is

        f: "f32[2, 1, N]" = prims.convert_element_type(getitem(call, 0), torch.float32)
        s: "bf16[2, 1, N]" = prims.convert_element_type(f / (aten.exp(-f) + 1), torch.bfloat16)
        product: "bf16[2, 1, N]" = s * getitem(call, 1)

    A block of a Llama, before and after:

        call   = linear_tilelang(norm(h), [Tq, Tk, Tv], ...)
        call_1 = linear_tilelang(attention, [To], ...)
        h_1    = h + getitem(call_1, 0)
        call_2 = linear_tilelang(norm_1(h_1), [Tgate, Tup], ...)
        product = silu(getitem(call_2, 0)) * getitem(call_2, 1)
        call_3 = linear_tilelang(product, [Tdown], ...)
        h_2    = h_1 + getitem(call_3, 0)

        call   = linear_tilelang(h, [Tq, Tk, Tv], ..., norm_weight=w, norm_eps=eps)
        call_1 = linear_tilelang(attention, [To], ..., residual=h)
        call_2 = linear_tilelang(getitem(call_1, 0), [Tgate, Tup], ..., norm_weight=w_1, ..., gated=True)
        call_3 = linear_tilelang(getitem(call_2, 0), [Tdown], ..., residual=getitem(call_1, 0))

    Calls stay where they are, so a residual must be computed before its call; if the second layer is the gate, the two
    change places. What anything else reads, and what has a symbolic size, stays as it is. Counts what was put into
    calls.
    """

    def rewrite(self, graph: fx.Graph) -> int:
        """Fuse what can be fused into each call."""
        return sum(map(_fuse, graph.find_nodes(op="call_function", target=lowered("linear", "tilelang"))))


def _fuse(call: fx.Node) -> int:
    # TileLang takes a second to import: where it runs a call, it is there.
    from ternarize.backends.tilelang.linear import fusible

    x, T_packed, _, E_mantissa, *_, group_size = map(value_of, call.args)
    can = fusible(x, T_packed, E_mantissa, group_size, rounds=bool(call.kwargs.get("rounds")))
    before = can.norm and _fuse_norm(call)
    # A call of two layers adds no residual, also where they are gated.
    after = (can.gate and _fuse_gate(call)) or (can.residual and _fuse_residual(call))
    return int(before) + int(after)


def _fuse_norm(call: fx.Node) -> bool:
    """Let the call normalise its input, if nothing else reads that."""
    x: Any = call.args[0]
    for pattern in _norm_patterns():
        found = pattern.match(x)
        if not found or len(x.users) > 1:
            continue
        h, weight, dims, eps = (found.kwargs[name] for name in ("h", "weight", "dims", "eps"))
        rank, K = x.meta["val"].dim(), x.meta["val"].shape[-1]
        if (
            not _alike(h, x.meta["val"])
            or not _alike(weight, x.meta["val"].new_empty(K))
            or [dim % rank for dim in dims] != [rank - 1]
            or not isinstance(eps, float)
        ):
            continue
        call.update_arg(0, h)
        call.kwargs = {**call.kwargs, "norm_weight": weight, "norm_eps": eps}
        found.erase_nodes()
        return True
    return False


def _fuse_gate(call: fx.Node) -> bool:
    """Let a call of two layers return silu of the one times the other, if nothing else reads either."""
    outputs, items = call.meta["val"], list(call.users)
    if [item.args[1] for item in items] not in ([0, 1], [1, 0]) or outputs[0].shape != outputs[1].shape:
        return False
    if any(len(item.users) > 1 for item in items):
        return False
    for product, pattern in itertools.product((user for item in items for user in item.users), _gate_patterns()):
        found = pattern.match(product)
        if not found or not _alike(product, outputs[0]):
            continue
        gate, up = found.kwargs["gate"], found.kwargs["up"]
        if {gate, up} != set(items):
            continue
        if gate.args[1] == 1:
            call.args = tuple(arg[::-1] if isinstance(arg, list) else arg for arg in call.args)
            gate.update_arg(1, 0)
        call.kwargs = {**call.kwargs, "gated": True}
        call.meta["val"] = [gate.meta["val"]]
        product.replace_all_uses_with(gate)
        found.erase_nodes()
        call.graph.erase_node(up)
        return True
    return False


def _fuse_residual(call: fx.Node) -> bool:
    """Let a call of one layer add what is added to its output, if nothing else reads that."""
    items = list(call.users)
    if len(call.meta["val"]) != 1 or len(items) != 1 or len(items[0].users) != 1:
        return False
    (item,), (total,) = items, items[0].users
    # With alpha it has keyword arguments.
    if total.target is not aten.add.Tensor or total.kwargs:
        return False
    residual = total.args[1] if total.args[0] is item else total.args[0]
    if not isinstance(residual, fx.Node) or not residual < call or not _alike(residual, item.meta["val"]):
        return False
    call.kwargs = {**call.kwargs, "residual": residual}
    total.replace_all_uses_with(item)
    call.graph.erase_node(total)
    return True


def _alike(node: Any, value: Tensor) -> bool:
    """Whether a node is a tensor of the dtype, shape and strides of another one; not if a size of it is symbolic."""
    own = node.meta["val"] if isinstance(node, fx.Node) else None
    if not isinstance(own, Tensor) or not all(isinstance(size, int) for size in (*own.shape, *own.stride())):
        return False
    return (own.dtype, own.shape, own.stride()) == (value.dtype, value.shape, value.stride())


# Written by hand: traced from functions, patterns would hold for one rank and one dtype.


@functools.cache
def _norm_patterns() -> list[Any]:
    """What an RMSNorm of h looks like."""
    # Inductor takes seconds to import: where this pass runs, it is there.
    from torch._inductor.pattern_matcher import CallFunction, Ignored, KeywordArg

    def normalised(add: Any) -> Any:
        h = CallFunction(prims.convert_element_type.default, KeywordArg("h"), torch.float32, _users=2)
        squares = CallFunction(aten.pow.Tensor_Scalar, h, 2)
        mean = CallFunction(aten.mean.dim, squares, KeywordArg("dims"), True)
        root = CallFunction(aten.rsqrt.default, CallFunction(add, mean, KeywordArg("eps")))
        return CallFunction(aten.mul.Tensor, h, root)

    def rounded(value: Any) -> Any:
        return CallFunction(prims.convert_element_type.default, value, Ignored())

    weight = KeywordArg("weight")
    return [
        CallFunction(aten.mul.Tensor, weight, rounded(normalised(aten.add.Tensor))),
        rounded(CallFunction(aten.mul.Tensor, normalised(aten.add.Scalar), weight)),
    ]


@functools.cache
def _gate_patterns() -> list[Any]:
    """What silu(gate) · up looks like, in either order."""
    from torch._inductor.pattern_matcher import CallFunction, Ignored, KeywordArg

    gate = CallFunction(prims.convert_element_type.default, KeywordArg("gate"), torch.float32, _users=2)
    exp = CallFunction(aten.exp.default, CallFunction(aten.neg.default, gate))
    quotient = CallFunction(aten.div.Tensor, gate, CallFunction(aten.add.Tensor, exp, 1))
    silu, up = CallFunction(prims.convert_element_type.default, quotient, Ignored()), KeywordArg("up")
    return [CallFunction(aten.mul.Tensor, silu, up), CallFunction(aten.mul.Tensor, up, silu)]
