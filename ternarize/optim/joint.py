"""One optimizer for the float parameters and the trits of a model."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.errors import ConfigError
from ternarize.optim.ternary import TernaryOptimizer


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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient of the float parameters, and what is staged, kept or flagged."""
        self._float.zero_grad(set_to_none)
        super().zero_grad()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_float" in state:
            return
        groups = [group for group in self.param_groups if not any(p in self._layers for p in group["params"])]
        self._float.__setstate__({"state": self.state, "param_groups": groups})

    def _float_gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in self._float.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                # Of a DTensor, which takes its time to import, this rank's shard: the others look at theirs.
                if hasattr(gradient, "to_local"):
                    gradient = gradient.to_local()
                if gradient is not None:
                    yield parameter, gradient._values() if gradient.is_sparse else gradient

    def _findings(self, loss: Tensor | float | None) -> Tensor:
        findings = super()._findings(loss)
        gradients = [gradient for _, gradient in self._float_gradients()]
        # The largest magnitude is finite exactly if every entry is, and cannot overflow as a sum of squares can.
        broken = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients, math.inf))
        return torch.cat([findings, broken.to(findings.device, torch.int32, non_blocking=True).reshape(1)])

    def _describe(self, findings: list[int]) -> list[str]:
        broken = [p for p, gradient in self._float_gradients() if not torch.isfinite(gradient).all()]
        phrases = super()._describe(findings)
        phrases += [f"gradient of {self._names.get(p, 'a parameter')!r}" for p in broken]
        return phrases or ["gradient of a float parameter on another rank"]

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
) -> TernaryOptimizer:
    """One optimizer for a model with ternary layers: for its float parameters and its trits.

    Schedulers, `torch.amp.GradScaler`, gradient clipping and `state_dict` act on it as on any optimizer. The schedulers
    that fit are those that multiply each group's own learning rate, such as LambdaLR and CosineAnnealingLR.

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
