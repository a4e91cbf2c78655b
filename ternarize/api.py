"""The calls on whole models: `ternarize`, `dequantize`, `freeze`, and what tells ternary models apart."""

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from ternarize.backends.torch.linear import dense_bias
from ternarize.candidates import DenseLayer, FilterFn, Skip, find_dense_layers
from ternarize.config import Init, TernaryConfig
from ternarize.distributed import keep_out_of_ddp
from ternarize.errors import ConfigError, ConversionError
from ternarize.layer import TRAINING_STATE, TernaryLinear, ternary_layers
from ternarize.passes.swap_linear import swap_linear_calls
from ternarize.quantize import quantize_bias, quantize_weight, relative_error, require_finite, require_ternary
from ternarize.report import ALREADY_TERNARY, LayerReport, TernaryReport

_DEFAULTS = TernaryConfig()


def ternarize(
    model: nn.Module | ExportedProgram,
    config: TernaryConfig | None = None,
    *,
    group_size: int = _DEFAULTS.group_size,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    filter_fn: FilterFn | None = None,
    init: Init = _DEFAULTS.init,
    trainable: bool = True,
    device: torch.device | str | None = None,
    inplace: bool = True,
    strict: bool = False,
) -> nn.Module:
    """Replace the linear layers of a model by ternary ones.

    Swapped are ``nn.Linear`` and transformers' ``Conv1D`` anywhere in the module tree, and in graph modules also
    ``F.linear`` on a parameter. Layers that share a weight become one shared layer. Left dense, with the reason in the
    report: what the arguments below ask for, output heads, embeddings and routers (`ternarize.skip.DEFAULT_EXCLUDE` and
    the output embedding of a transformers model), subclasses of ``nn.Linear``, layers with hooks or parametrizations,
    and weights that something dense shares. Layers that are ternary already stay as they are.

    The report is ``model.ternary_report``, a `ternarize.report.TernaryReport`: print it.

    Args:
        model: any module, a graph module, or an exported program, of which ``model.module()`` is made ternary.
        config: what kind of layers to make; a default one of ``group_size`` and ``init`` if None. With several planes
            the layers are for inference only, whatever ``trainable`` says.
        group_size: weights that share an exponent along K, a positive multiple of 4, or -1 for whole rows.
        include: regular expressions over whole parts of a qualified name ('mlp' is in 'layers.0.mlp.up_proj'). If
            given, only layers that match one are swapped, also those that are otherwise kept dense by default.
        exclude: likewise; layers that match one are never swapped. The defaults are always added.
        filter_fn: called with each layer that names do not exclude and its qualified name; False keeps it dense.
        init: how weights become trits, ``absmean``, ``least_squares`` or ``exact``: see `TernaryConfig`.
        trainable: whether to keep the integers that `ternarize.TernaryOptimizer` needs.
        device: where to move each layer as it is swapped, one at a time; the rest of the model stays where it is.
        inplace: whether to change ``model`` itself. If not, everything but the swapped weights is copied.
        strict: raise if any linear layer is skipped for a reason other than include, exclude, defaults and filter_fn.

    Returns:
        The ternary model: ``model`` itself if ``inplace``, unless it is one linear layer or an exported program.

    Raises:
        ConfigError: for options that mean nothing or contradict each other.
        ConversionError: if nothing can be swapped, a weight is not finite, or not ternary where ``init="exact"`` needs
            it, or ``strict`` forbids a skip. The model is unchanged then.
    """
    config = _resolve(config, group_size, init)
    if isinstance(model, ExportedProgram):
        # Its parameters are the program's own, but they are only replaced, never written.
        model = model.module()
    elif not isinstance(model, nn.Module):
        raise ConversionError(f"cannot make a {type(model).__name__} ternary: pass an nn.Module or an ExportedProgram")
    elif not inplace and any(isinstance(module, fx.GraphModule) for module in model.modules()):
        model = copy.deepcopy(model)
        inplace = True
    already = list(ternary_layers(model))
    layers = find_dense_layers(model, include, exclude, filter_fn)
    _require_work(model, layers, already=bool(already), strict=strict)
    for layer in layers:
        if layer.skip is None:
            _require_finite(layer)
            if config.init == "exact":
                require_ternary(layer.weight, config.group_size, f"the weight of {layer.name!r}")

    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    rows = [_report_ternary(name, ternary, reason=ALREADY_TERNARY) for name, ternary in already]
    rows += [_report_skipped(layer, layer.skip) for layer in layers if layer.skip is not None]
    groups = _sharing_a_weight(layers)
    # Only `groups` may keep dense layers alive now, so that in place each is freed as soon as it is replaced.
    del layers
    replaced: dict[int, nn.Module] = {}
    while groups:
        group = groups.pop(0)
        ternary, row = _convert(group[0], config, trainable=trainable and config.planes == 1, device=device)
        rows.append(row)
        rows += [LayerReport(name=tied.name, tied_to=row.name, bytes_before=0, bytes_after=0) for tied in group[1:]]
        if inplace:
            model = _swap(model, group, ternary)
        else:
            replaced |= {id(layer.module): ternary for layer in group}
    if not inplace:
        # With the new layers in its memo, the copy holds them and never copies what they replace.
        model = copy.deepcopy(model, replaced)
    _leave_fused_encoders(model)
    keep_out_of_ddp(model)
    rows.sort(key=lambda row: order.get(row.name, len(order)))
    model.__dict__["ternary_report"] = report = TernaryReport(tuple(rows))
    if isinstance(model, fx.GraphModule):
        # Copies of a graph module keep these attributes and no others.
        model.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})["ternary_report"] = report
    return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace ternary layers by ``nn.Linear`` with the same weights, in place; shared layers stay shared.

    Args:
        model: any module.
        dtype: of the dense layers; for each the dtype of the weight that it was made from if None.

    Returns:
        ``model``, or an nn.Linear if it is one ternary layer.
    """
    for layer, names in _places(model):
        dense_dtype = dtype or layer.dtype
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(
            torch.ops.ternarize.dequantize(
                layer.T_packed, layer.E, layer.E_mantissa, layer.in_features, layer.group_size, dense_dtype
            )
        )
        if layer.bias is not None and layer.bias_exponent is not None:
            linear.bias = nn.Parameter(dense_bias(layer.bias, layer.bias_exponent).to(dense_dtype))
        model = _replace(model, names, linear.train(layer.training))
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Drop the training state of every ternary layer, in place; gradients still flow through to their inputs."""
    for _, layer in ternary_layers(model):
        layer.freeze()
    return model


def is_ternary(model: nn.Module) -> bool:
    """Whether any layer of the model is ternary."""
    return next(ternary_layers(model), None) is not None


def _resolve(config: TernaryConfig | None, group_size: int, init: Init) -> TernaryConfig:
    if config is None:
        return TernaryConfig(group_size=group_size, init=init)
    for name, value in (("group_size", group_size), ("init", init)):
        if value not in (getattr(_DEFAULTS, name), getattr(config, name)):
            raise ConfigError(
                f"{name}={value!r} and config.{name}={getattr(config, name)!r} differ: give one of them, in the config"
            )
    return config


def _require_work(model: nn.Module, layers: list[DenseLayer], *, already: bool, strict: bool) -> None:
    """Raise unless there is a layer to swap, or one that is ternary, and ``strict`` allows what is skipped."""
    limits = [f"{layer.name}: {layer.skip.reason}" for layer in layers if layer.skip and not layer.skip.chosen]
    if strict and limits:
        more = f" (and {len(limits) - 3} more)" if len(limits) > 3 else ""
        raise ConversionError(f"strict=True and layers cannot be swapped: {'; '.join(limits[:3])}{more}; exclude them")
    if already or any(layer.skip is None for layer in layers):
        return
    if not layers:
        raise ConversionError(f"nothing to make ternary: this {type(model).__name__} has no linear layer")
    reasons = Counter(layer.skip.reason for layer in layers if layer.skip is not None)
    counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    raise ConversionError(f"nothing to make ternary: all {len(layers)} linear layers are skipped: {counts}")


def _require_finite(layer: DenseLayer) -> None:
    require_finite(layer.weight, f"the weight of {layer.name!r}")
    if layer.bias is not None:
        require_finite(layer.bias[None], f"the bias of {layer.name!r}")


def _sharing_a_weight(layers: list[DenseLayer]) -> list[list[DenseLayer]]:
    """The layers to swap, those of one weight together."""
    groups: defaultdict[int, list[DenseLayer]] = defaultdict(list)
    for layer in layers:
        if layer.skip is None:
            groups[id(layer.parameter)].append(layer)
    return list(groups.values())


def _convert(
    layer: DenseLayer, config: TernaryConfig, *, trainable: bool, device: torch.device | str | None
) -> tuple[TernaryLinear, LayerReport]:
    """A ternary layer with the weights of a dense one, and its row of the report."""
    weight = layer.weight.to(device) if device is not None else layer.weight
    error = None
    if weight.is_meta:
        ternary = TernaryLinear(
            weight.shape[1],
            weight.shape[0],
            layer.bias is not None,
            config=config,
            trainable=trainable,
            device=weight.device,
            dtype=weight.dtype,
        )
    else:
        quantized = quantize_weight(weight, config, trainable=trainable, name=f"the weight of {layer.name!r}")
        error = relative_error(weight, quantized, config.group_size)
        bias, bias_exponent = quantize_bias(layer.bias) if layer.bias is not None else (None, None)
        mantissa = quantized.E_mantissa
        ternary = TernaryLinear.from_levels(
            quantized.levels,
            quantized.E,
            config=config,
            # Without it more kernels run the layer.
            E_mantissa=None if mantissa is None or bool((mantissa == 1).all()) else mantissa,
            bias=bias,
            bias_exponent=bias_exponent,
            T_accum=quantized.T_accum,
            trainable=trainable,
            dtype=weight.dtype,
        )
    ternary.name = layer.name
    ternary.train(layer.module.training)
    return ternary, _report_ternary(layer.name, ternary, bytes_before=layer.nbytes, weight_error=error)


def _report_ternary(
    name: str,
    layer: TernaryLinear,
    *,
    reason: str | None = None,
    bytes_before: int | None = None,
    weight_error: float | None = None,
) -> LayerReport:
    sizes = {parameter_name: parameter.nbytes for parameter_name, parameter in layer.named_parameters()}
    bytes_training = sum(sizes.pop(state, 0) for state in TRAINING_STATE)
    bytes_after = sum(sizes.values())
    return LayerReport(
        name=name,
        reason=reason,
        bytes_before=bytes_after if bytes_before is None else bytes_before,
        bytes_after=bytes_after,
        bytes_training=bytes_training,
        weight_error=weight_error,
    )


def _report_skipped(layer: DenseLayer, skip: Skip) -> LayerReport:
    return LayerReport(name=layer.name, reason=skip.reason, bytes_before=layer.nbytes, bytes_after=layer.nbytes)


def _swap(model: nn.Module, group: list[DenseLayer], ternary: TernaryLinear) -> nn.Module:
    """Put one ternary layer in the place of some dense ones, modules first: calls then find it where they look."""
    for layer in group:
        if layer.calls is None:
            model = _replace(model, layer.names, ternary)
    for layer in group:
        if layer.calls is not None:
            swap_linear_calls(layer.calls, ternary)
    return model


def _replace(model: nn.Module, names: list[str], module: nn.Module) -> nn.Module:
    """Put a module under each of some qualified names; returns the model, which is the module if a name is empty."""
    if "" in names:
        return module
    for name in names:
        model.set_submodule(name, module)
    return model


def _places(model: nn.Module) -> list[tuple[TernaryLinear, list[str]]]:
    """The ternary layers of a model, each with every name it has."""
    places: dict[int, tuple[TernaryLinear, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TernaryLinear):
            places.setdefault(id(module), (module, []))[1].append(name)
    return list(places.values())


def _leave_fused_encoders(model: nn.Module) -> None:
    """Turn off the fused inference path of torch's encoders, which reads dense weights past the layers' forward."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and is_ternary(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and is_ternary(module):
            module.use_nested_tensor = False
