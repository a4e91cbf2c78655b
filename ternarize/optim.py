"""Optimizers for integer weights: torch.optim.Optimizer subclasses over the parameters of ternary layers.

Backward leaves small integers in each layer's stage; `TernaryOptimizer.step` applies them all or, if anything was not
finite, none of them. `build_optimizer` puts a float optimizer for the rest of the model under the same refusal.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.backends.torch.update import NONFINITE_GRADIENT, NONFINITE_LOSS, NONFINITE_OUTPUT
from ternarize.errors import CheckpointError, ConfigError, NonFiniteError
from ternarize.layer import STAGE, TernaryLinear, ternary_layers

#: Learning rate by form of the state: the best peaks of docs/training.md, and whole votes for `sign`.
DEFAULT_LR = {"int8": 28 / 254, "int4": 14 / 254, "sign": 1.0}

_WHAT = {NONFINITE_OUTPUT: "output", NONFINITE_GRADIENT: "gradient"}


def _form(layer: TernaryLinear) -> str:
    if layer.rule == "sign":
        return "sign"
    return "int4" if layer.T_momentum is None else "int8"


def _trainable_layers(modules: nn.Module | Iterable[nn.Module]) -> Iterator[TernaryLinear]:
    """The trainable ternary layers in some modules. A frozen one among many is left out; given itself, it is kept."""
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"a ternary optimizer got a {type(module).__name__}: it needs modules, because an update takes more "
                "than a layer's parameters; pass the model or its TernaryLinear layers"
            )
        for name, layer in ternary_layers(module):
            layer.name = layer.name or name
            if layer.trainable or layer is module:
                yield layer


class TernaryOptimizer(torch.optim.Optimizer):
    """Steps the trits (and, if a layer keeps E_accum, the exponents) of ternary layers.

    Its parameters are the layers' T_packed; layers of different rule or form get param groups of their own. Building
    it allocates each layer's stage, 8 bits a weight. The integer state is the model's: `state_dict` here only holds the
    position in the random numbers and the number of refused steps, and with the model's resumes a run bit for bit.

    The learning rate of a group is the fraction of a trit per unit of momentum under `factored`, and the weight of a
    vote under `sign`. A group whose learning rate is 0 drops its gradient and changes nothing.

    Args:
        params: a module, an iterable of modules, or of dicts {"params": module or iterable of them, "lr": ...}: all
            trainable ternary layers in them.
        lr: of groups that give none; None: by rule and form, as in `DEFAULT_LR`.
        threshold: votes that step a trit under `sign`, 1 to 127.
        exponent_threshold: votes that step an exponent, 1 to 127.
        apply: when the state changes: "step", in `step`.
        skip_nonfinite: what a refused step does: False raises NonFiniteError (one synchronisation with the device a
            step), True counts it in `skipped_steps` (none).
        seed: of stochastic rounding, 32 bits.

    Raises:
        ConfigError: for parameters instead of modules, no trainable ternary layer, or a value that means nothing.
    """

    _COPIED: tuple[str, ...] = ("skip_nonfinite", "_seed", "_layers", "_skipped")

    def __init__(
        self,
        params: nn.Module | Iterable[nn.Module | dict[str, Any]],
        lr: float | None = None,
        *,
        threshold: int = 16,
        exponent_threshold: int = 16,
        apply: str = "step",
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        if apply != "step":
            raise ConfigError(f"apply={apply!r}: this release has 'step' only")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed} is not a number of 32 bits: use 0 to {2**32 - 1}")
        self.skip_nonfinite = skip_nonfinite
        self._seed = seed
        self._layers: dict[Tensor, TernaryLinear] = {}
        self._skipped = torch.zeros((), dtype=torch.int64)
        groups: Any = [{"params": params}] if isinstance(params, nn.Module) else params
        super().__init__(groups, {"lr": lr, "threshold": threshold, "exponent_threshold": exponent_threshold})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the trainable ternary layers of ``param_group["params"]``, as one group for each rule and form.

        Raises:
            ConfigError: as for the class.
        """
        options = {**self.defaults, **param_group}
        for name in ("threshold", "exponent_threshold"):
            if not 1 <= options[name] <= 127:
                raise ConfigError(f"{name}={options[name]} does not fit an int8 accumulator: use 1 to 127")
        if options["lr"] is not None and not options["lr"] >= 0:
            raise ConfigError(f"lr={options['lr']} is negative: use 0 or more, or None for the rule's own")
        forms: dict[str, dict[Tensor, TernaryLinear]] = {}
        for layer in _trainable_layers(param_group["params"]):
            forms.setdefault(_form(layer), {})[layer.T_packed] = layer
        if not forms:
            raise ConfigError("there is no trainable ternary layer to optimize: call ternarize(model) first")
        for form, layers in forms.items():
            lr = DEFAULT_LR[form] if options["lr"] is None else options["lr"]
            super().add_param_group({**options, "params": list(layers), "lr": lr})
            for parameter, layer in layers.items():
                layer.prepare_training()
                layer.rng.copy_(torch.tensor([self._seed, len(self._layers), 0]))
                self._layers[parameter] = layer

    @property
    def skipped_steps(self) -> int:
        """How many steps were refused because something was not finite (synchronises with the device)."""
        return int(self._skipped)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Apply what backward staged, in every layer, or refuse it in every layer; either way the stage is empty after.

        A layer without a gradient stays as it is. A refused step changes no bit of any parameter.

        Args:
            closure: computes the loss and its gradients, and returns the loss.
            loss: checked to be finite. Without it, only what backward computed is.

        Returns:
            The loss, if there is one.

        Raises:
            NonFiniteError: for a refused step, unless ``skip_nonfinite``; names the layers and what was not finite.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        findings = self._findings(loss)
        refuse = findings.any()
        self._apply(refuse)
        self._skipped = self._skipped.to(refuse.device).add_(refuse)
        if not self.skip_nonfinite and refuse:
            raise NonFiniteError(
                f"step refused, nothing was changed: {', '.join(self._describe(findings.tolist()))} not finite; "
                "lower the learning rate or look for the cause, or let skip_nonfinite=True skip such steps"
            )
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient, staged ones too."""
        super().zero_grad(set_to_none)
        staged = [getattr(layer, name) for layer in self._layers.values() for name in (*STAGE, "status")]
        torch._foreach_zero_([tensor for tensor in staged if tensor is not None])

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; a layer's entry is its ``rng`` (seed, layer, step) and the number of refused steps."""
        for parameter, layer in self._layers.items():
            self.state[parameter] = {"rng": layer.rng, "skipped_steps": self._skipped}
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which drives the layers that are copied along with it."""
        return super().__getstate__() | {name: getattr(self, name) for name in self._COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:
            # A copy, whose layers brought their state along.
            return
        for parameter, layer in self._layers.items():
            saved = self.state.pop(parameter, {})
            if "rng" not in saved:
                raise CheckpointError(
                    f"the optimizer state has no 'rng' for layer {layer.name!r}: load one that this optimizer saved"
                )
            layer.rng.copy_(saved["rng"])
            self._skipped = saved["skipped_steps"].clone()

    def _findings(self, loss: Tensor | float | None) -> Tensor:
        """What was not finite: int32, one entry a layer and one for the loss, 0 where all is well."""
        # Everything here stays on the device; layers on other devices send their flag to the first one's.
        device = next(iter(self._layers.values())).status.device
        if not isinstance(loss, Tensor):
            loss = torch.full((), 0.0 if loss is None else loss, device=device)
        of_loss = (~torch.isfinite(loss).all()).to(torch.int32) * NONFINITE_LOSS
        flags = [*(layer.status[0] for layer in self._layers.values()), of_loss]
        return torch.stack([flag.to(device, non_blocking=True) for flag in flags])

    def _describe(self, findings: list[int]) -> list[str]:
        phrases = []
        for i, (layer, bits) in enumerate(zip(self._layers.values(), findings, strict=False)):
            what = [word for bit, word in _WHAT.items() if bits & bit]
            if what:
                phrases.append(f"{' and '.join(what)} of layer {layer.name or i!r}")
        # A compiled graph flags the loss that it returns in the status of one of its layers.
        if any(bits & NONFINITE_LOSS for bits in findings[: len(self._layers) + 1]):
            phrases.append("the loss")
        return phrases

    def _apply(self, refuse: Tensor) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._layers:
                    self._commit(self._layers[parameter], group, refuse.to(parameter.device, non_blocking=True))

    @staticmethod
    def _commit(layer: TernaryLinear, group: dict[str, Any], refuse: Tensor) -> None:
        lr = float(group["lr"])
        # An accumulator may rest on its threshold, so that without this even an update of nothing could step a trit.
        drop = refuse if lr > 0 else torch.ones_like(refuse)
        torch.ops.ternarize.update_commit(
            layer.T_packed,
            layer.E,
            layer.T_accum,
            layer.T_momentum,
            layer.E_accum,
            layer.row_log2,
            layer.col_log2,
            layer.rng,
            layer.stage,
            layer.stage_E,
            layer.stage_row,
            layer.stage_col,
            layer.status,
            drop.to(torch.int32).reshape(1),
            lr,
            group["threshold"],
            group["exponent_threshold"],
            layer.group_size,
            layer.rule,
        )
        layer.rng[2:].add_(~refuse)


class JointOptimizer(TernaryOptimizer):
    """A `TernaryOptimizer` that also drives a float optimizer: one list of groups, one state, one refusal.

    Made by `build_optimizer`. The float groups come first. A step is refused as a whole, also where only the gradient
    of a float parameter is not finite. Refusing costs one synchronisation with the device, unless the float optimizer
    takes the flag on the device, as those of torch do with ``fused=True``.
    """

    _COPIED = (*TernaryOptimizer._COPIED, "_float", "_names")

    def __init__(self, float_optimizer: torch.optim.Optimizer, model: nn.Module, **ternary: Any) -> None:
        super().__init__(model, **ternary)
        self._float = float_optimizer
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        # The same objects, so that a scheduler's learning rates and a checkpoint's state reach the float optimizer.
        self.state = float_optimizer.state
        self.param_groups = [*float_optimizer.param_groups, *self.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_float" in state:
            return
        groups = [group for group in self.param_groups if not any(p in self._layers for p in group["params"])]
        self._float.__setstate__({"state": self.state, "param_groups": groups})

    def _float_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in self._float.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter, parameter.grad._values() if parameter.grad.is_sparse else parameter.grad

    def _findings(self, loss: Tensor | float | None) -> Tensor:
        findings = super()._findings(loss)
        gradients = [gradient for _, gradient in self._float_gradients()]
        # The largest magnitude is finite exactly if every entry is, and cannot overflow as a sum of squares can.
        broken = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients, math.inf))
        return torch.cat([findings, broken.to(findings.device, torch.int32, non_blocking=True).reshape(1)])

    def _describe(self, findings: list[int]) -> list[str]:
        broken = [p for p, gradient in self._float_gradients() if not torch.isfinite(gradient).all()]
        return super()._describe(findings) + [f"gradient of {self._names.get(p, 'a parameter')!r}" for p in broken]

    def _apply(self, refuse: Tensor) -> None:
        super()._apply(refuse)
        fused: Any = self._float
        if getattr(fused, "_step_supports_amp_scaling", False):
            # What torch.amp.GradScaler does: the fused kernels leave every parameter as it is where found_inf is 1.
            fused.grad_scale, fused.found_inf = None, refuse.to(torch.float32)
            fused.step()
            del fused.grad_scale, fused.found_inf
        elif not refuse:
            self._float.step()


def build_optimizer(
    model: nn.Module,
    float_optimizer: Callable[..., torch.optim.Optimizer] | torch.optim.Optimizer = torch.optim.AdamW,
    *,
    ternary: dict[str, Any] | None = None,
    **float_arguments: Any,
) -> torch.optim.Optimizer:
    """One optimizer for a model with ternary layers: for its float parameters and its trits.

    Schedulers, `torch.amp.GradScaler`, gradient clipping and `state_dict` act on it as on any optimizer; a GradScaler
    needs a float parameter, in whose gradients it looks for overflow. The schedulers that fit are those that multiply
    each group's own learning rate, such as LambdaLR and CosineAnnealingLR.

    Args:
        model: with at least one trainable ternary layer.
        float_optimizer: class or function that makes an optimizer of the float parameters that require gradients, or
            one already made (for its own param groups).
        ternary: arguments of `TernaryOptimizer` after the first.
        float_arguments: of ``float_optimizer``.

    Raises:
        ConfigError: without a trainable ternary layer, or with arguments for an optimizer already made.
    """
    if isinstance(float_optimizer, torch.optim.Optimizer):
        if float_arguments:
            raise ConfigError(
                f"{', '.join(float_arguments)}: the float optimizer is already made; give them to it, or pass its class"
            )
        return JointOptimizer(float_optimizer, model, **ternary or {})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return TernaryOptimizer(model, **ternary or {})
    return JointOptimizer(float_optimizer(parameters, **float_arguments), model, **ternary or {})
