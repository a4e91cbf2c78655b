"""The linear layers of a model, and for each that must stay dense the reason."""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ternarize.passes.swap_linear import LinearCalls, find_linear_calls, otherwise_read
from ternarize.skip import matches, skip_reason

FilterFn = Callable[[nn.Module, str], bool]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class Skip:
    """Why a layer stays dense."""

    reason: str
    chosen: bool
    """Whether its name, a default or filter_fn asked for that; else it is a limit of `ternarize`."""


@dataclasses.dataclass(eq=False)
class DenseLayer:
    """A dense linear layer of a model."""

    names: list[str]
    """Qualified names under which the model reaches it."""
    module: nn.Module
    """nn.Linear, a subclass of it, or Conv1D; for calls in a graph, an nn.Linear around the parameters they read."""
    paths: set[str]
    """Qualified names of its weight parameter."""
    calls: LinearCalls | None = None
    """The calls, for a layer that is only a function in a graph."""
    skip: Skip | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def parameter(self) -> nn.Parameter | None:
        """The dense weight as the model stores it, if it is a parameter."""
        return self.module._parameters.get("weight")

    @property
    def weight(self) -> Tensor:
        """[N, K], a view of the parameter."""
        weight = self.module.get_parameter("weight").detach()
        return weight if isinstance(self.module, nn.Linear) else weight.t()

    @property
    def bias(self) -> nn.Parameter | None:
        """[N], or None."""
        return self.module._parameters.get("bias")

    @property
    def nbytes(self) -> int:
        """Of all parameters."""
        return sum(parameter.nbytes for parameter in self.module.parameters())


def _dense_types() -> tuple[type[nn.Module], ...]:
    """nn.Linear and, where transformers is loaded, GPT-2's Conv1D: a linear layer whose weight is stored [K, N]."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (nn.Linear,) if conv1d is None else (nn.Linear, conv1d)


def find_dense_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None, filter_fn: FilterFn | None
) -> list[DenseLayer]:
    """Every dense linear layer of a model, in its order, each with the reason to skip it, if there is one.

    Args:
        model: any module; graph modules inside it have their functional linear calls found too.
        include: as in `ternarize.ternarize`.
        exclude: likewise.
        filter_fn: likewise.
    """
    by_module: dict[int, DenseLayer] = {}
    layers: list[DenseLayer] = []
    read: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in by_module:
            by_module[id(module)].names.append(name)
            by_module[id(module)].paths.add(_join(name, "weight"))
        elif isinstance(module, _dense_types()):
            by_module[id(module)] = DenseLayer([name], module, {_join(name, "weight")})
            layers.append(by_module[id(module)])
        if isinstance(module, fx.GraphModule):
            read.update(id(getattr(*_locate(module, path))) for path in otherwise_read(module))
            layers.extend(_called_layer(name, calls) for calls in find_linear_calls(module))
    heads = _output_embeddings(model)
    for layer in layers:
        layer.skip = _skip_by_name(layer, include, exclude, heads, filter_fn) or _skip_by_kind(layer)
    _skip_by_ties(model, layers, read)
    return layers


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _locate(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return module.get_submodule(owner), name


def _called_layer(prefix: str, calls: LinearCalls) -> DenseLayer:
    weight = calls.graph_module.get_parameter(calls.weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    if calls.bias is not None:
        linear.bias = calls.graph_module.get_parameter(calls.bias)
    linear.train(calls.graph_module.training)
    path = _join(prefix, calls.weight)
    return DenseLayer([path.removesuffix(".weight")], linear, {path}, calls)


def _output_embeddings(model: nn.Module) -> set[int]:
    """Ids of the modules that transformers models name as their output embeddings."""
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return {id(getter()) for getter in getters if callable(getter)}


def _skip_by_name(
    layer: DenseLayer,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    heads: set[int],
    filter_fn: FilterFn | None,
) -> Skip | None:
    for name in layer.names:
        reason = skip_reason(name, include, exclude)
        included = include is not None and any(matches(name, pattern) for pattern in include)
        if reason is None and id(layer.module) in heads and not included:
            reason = "kept dense by default (output embedding): name it in include to convert it"
        if reason is None and filter_fn is not None and not filter_fn(layer.module, name):
            reason = "refused by filter_fn"
        if reason is not None:
            return Skip(reason, chosen=True)
    return None


def _skip_by_kind(layer: DenseLayer) -> Skip | None:
    module, weight = layer.module, layer.parameter
    if layer.calls is not None and layer.calls.refusal is not None:
        reason = layer.calls.refusal
    elif parametrize.is_parametrized(module):
        reason = "its weight is parametrized: remove the parametrization first"
    elif type(module) not in _dense_types():
        reason = f"{type(module).__name__} is a subclass of nn.Linear and may do something else"
    elif any(getattr(module, hooks) for hooks in _HOOKS):
        reason = "it has hooks (weight_norm and pruning are hooks too): remove them first"
    elif "forward" in vars(module):
        reason = "its forward was replaced on the instance"
    elif type(weight) is not nn.Parameter:
        reason = f"its weight is a {type(weight).__name__}, not a plain parameter"
    elif not weight.is_floating_point():
        reason = f"its weight is {weight.dtype}, not floating-point"
    elif weight.numel() == 0:
        reason = "its weight is empty"
    else:
        return None
    return Skip(reason, chosen=False)


def _skip_by_ties(model: nn.Module, layers: Sequence[DenseLayer], read: set[int]) -> None:
    """Keep weights dense that anything dense still needs: what shares a weight is swapped together or not at all."""
    sharing: defaultdict[int, list[DenseLayer]] = defaultdict(list)
    for layer in layers:
        if layer.parameter is not None:
            sharing[id(layer.parameter)].append(layer)
    registered: defaultdict[int, set[str]] = defaultdict(set)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        registered[id(parameter)].add(path)
    # A swapped module's parameters are gone from where a graph looks for them.
    bias_users: defaultdict[int, set[int]] = defaultdict(set)
    for layer in layers:
        if layer.calls is not None:
            bias_users[id(layer.bias)].add(id(layer.parameter))
    for weight_id, group in sharing.items():
        biases = {id(layer.bias) for layer in group if layer.bias is not None}
        elsewhere = registered[weight_id].difference(*(layer.paths for layer in group))
        dense = next((layer for layer in group if layer.skip is not None), None)
        if elsewhere:
            reason = f"shares its weight with {min(elsewhere)!r}, which stays dense"
        elif dense is not None:
            reason = f"shares its weight with {dense.name!r}, which stays dense"
        elif weight_id in read:
            reason = "the graph reads its weight for something else too"
        elif any(bias in read or bias_users[bias] - {weight_id} for bias in biases):
            reason = "the graph reads its bias for something else too"
        elif len({id(layer.bias) for layer in group}) > 1:
            reason = f"shares its weight with {group[0].name!r}, but not its bias"
        else:
            continue
        for layer in group:
            layer.skip = layer.skip or Skip(reason, chosen=False)
