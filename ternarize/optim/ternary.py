"""TernaryOptimizer: steps the trits and exponents of ternary layers."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ternarize.backends.torch.update import NONFINITE_GRADIENT, NONFINITE_LOSS, NONFINITE_OUTPUT
from ternarize.distributed import Replicas, keep_out_of_ddp
from ternarize.errors import CheckpointError, ConfigError, NonFiniteError
from ternarize.layer import STAGE, Apply, TernaryLinear, ternary_layers
from ternarize.optim import hooked
from ternarize.optim.overflow import Overflow

#: Learning rate by `TernaryConfig.form`: the best peaks of docs/training.md, and whole votes for `sign`.
DEFAULT_LR = {"int8": 20 / 254, "int4": 14 / 254, "sign": 1.0}

_WHAT = {NONFINITE_OUTPUT: "output", NONFINITE_GRADIENT: "gradient"}


def _trainable_layers(modules: nn.Module | Iterable[nn.Module]) -> Iterator[TernaryLinear]:
    """The trainable ternary layers in some modules. A frozen one among many is left out; given itself, it is kept."""
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"a ternary optimizer got a {type(module).__name__}: it needs modules, because an update takes more "
                "than a layer's parameters; pass the model or its TernaryLinear layers"
            )
        keep_out_of_ddp(module)
        for name, layer in ternary_layers(module):
            layer.name = layer.name or name
            if hasattr(layer.T_packed, "to_local"):
                raise ConfigError(
                    f"the parameters of layer {layer.name!r} are sharded, and an update takes whole layers: give "
                    "fully_shard(..., ignored_params=set(layer.parameters())) for every ternary layer"
                )
            if layer.trainable or layer is module:
                yield layer


class TernaryOptimizer(torch.optim.Optimizer):
    """Steps the trits (and, if a layer keeps E_accum, the exponents) of ternary layers.

    Its parameters are the layers' T_packed, and one `Overflow`; layers of different rule or form get param groups of
    their own. The integer state is the model's: `state_dict` here only holds the position in the random numbers and the
    number of refused steps, and with the model's resumes a run bit for bit.

    The learning rate of a group is the fraction of a trit per unit of momentum under `factored`, and the weight of a
    vote under `sign`. A group whose learning rate is 0 drops its gradient and changes nothing.

    When the state changes, ``apply``:

    - "step": backward adds small integers to each layer's stage, 8 bits a weight, and `step` applies them all or, if
      anything was not finite, none of them.
    - "backward": each backward is an update of its own, made inside of it; `step` only reports. No stage is allocated,
      but one for the layer at hand. A layer whose gradient is not finite is left as it is, and so are all layers where
      the loss is not finite: compiled graphs look at it, elsewhere `guard_loss` does. The learning rate of a group is a
      tensor, which schedulers write to; a number that is put in its place counts from the next `step` or `zero_grad`.
    - "hooks": backward keeps grad_y and x, and `step` forms the gradient of all tokens at once. Exact where gradients
      are accumulated, at the price of (N + K) numbers a token for each layer.

    With torch.distributed, every rank makes this optimizer and steps it. Building it gives all ranks the ternary layers
    of the first one; a step sums what they staged, and is refused everywhere if anything is not finite anywhere.

    Args:
        params: a module, an iterable of modules, or of dicts {"params": module or iterable of them, "lr": ...}: all
            trainable ternary layers in them.
        lr: of groups that give none; None: by rule and form, as in `DEFAULT_LR`.
        threshold: votes that step a trit under `sign`, 1 to 127.
        exponent_threshold: votes that step an exponent, 1 to 127.
        apply: when the state changes: "step", "backward" or "hooks".
        skip_nonfinite: what a refused step does: False raises NonFiniteError (one synchronisation with the device a
            step), True counts it in `skipped_steps` (none).
        seed: of stochastic rounding, 32 bits.
        process_group: of the processes that train copies of the model; None: torch.distributed's default group, if it
            is initialised when the optimizer is built.

    Raises:
        ConfigError: for parameters instead of modules, no trainable ternary layer, or a value that means nothing.
    """

    _COPIED: tuple[str, ...] = ("skip_nonfinite", "_seed", "_layers", "_skipped", "_mode", "_replicas", "_overflow")

    def __init__(
        self,
        params: nn.Module | Iterable[nn.Module | dict[str, Any]],
        lr: float | None = None,
        *,
        threshold: int = 16,
        exponent_threshold: int = 16,
        apply: Apply = "step",
        skip_nonfinite: bool = False,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if apply not in get_args(Apply):
            raise ConfigError(f"apply={apply!r} is unknown: use one of {', '.join(get_args(Apply))}")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"seed={seed} is not a number of 32 bits: use 0 to {2**32 - 1}")
        self.skip_nonfinite = skip_nonfinite
        self._mode: Apply = apply
        self._replicas = Replicas(process_group)
        if apply == "backward" and self._replicas.size > 1:
            raise ConfigError('apply="backward" updates each process by its own gradient: use "step" with several')
        self._seed = seed
        self._layers: dict[Tensor, TernaryLinear] = {}
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._overflow = Overflow()
        self._overflow.owner = self
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
        # A group's learning rate may be a tensor, which has a device.
        kinds: dict[tuple[str, torch.device], dict[Tensor, TernaryLinear]] = {}
        for layer in _trainable_layers(param_group["params"]):
            kinds.setdefault((layer.config.form, layer.T_packed.device), {})[layer.T_packed] = layer
        if not kinds:
            raise ConfigError("there is no trainable ternary layer to optimize: call ternarize(model) first")
        for (form, device), layers in kinds.items():
            lr = DEFAULT_LR[form] if options["lr"] is None else options["lr"]
            parameters = list(layers) if self._layers else [*layers, self._overflow]
            group = {**options, "params": parameters, "lr": lr}
            super().add_param_group(group)
            self._prepare(group, list(layers.values()), device)

    def _prepare(self, group: dict[str, Any], layers: list[TernaryLinear], device: torch.device) -> None:
        given: dict[str, Any] = {}
        if self._mode == "backward":
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            shared = [layer.refuse for layer in self._layers.values() if layer.status.device == device]
            given = {
                "lr": group["lr"],
                "refuse": shared[0] if shared else torch.zeros(1, dtype=torch.int32, device=device),
                "threshold": group["threshold"],
                "exponent_threshold": group["exponent_threshold"],
            }
        for layer in layers:
            layer.prepare_training(self._mode, **given)
            layer.rng.copy_(torch.tensor([self._seed, len(self._layers), 0]))
            self._replicas.own(layer.rng)
            self._replicas.broadcast(layer.parameters())
            self._layers[layer.T_packed] = layer

    @property
    def skipped_steps(self) -> int:
        """How many steps were refused because something was not finite (synchronises with the device)."""
        return int(self._skipped)

    def guard_loss(self, loss: Tensor) -> Tensor:
        """A copy of the loss: its backward refuses the update, or the next step, if it is not finite.

        Compiled graphs that return a loss do this themselves.
        """
        for flag in self._refusals() or [next(iter(self._layers.values())).status]:
            loss = torch.ops.ternarize.guard_loss(loss, flag, NONFINITE_LOSS)
        return loss

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None, *, loss: Tensor | float | None = None) -> Any:
        """Apply what backward left, in every layer, or refuse it in every layer; either way nothing is left after.

        A layer without a gradient stays as it is. A refused step changes no bit of any parameter. With
        ``apply="backward"`` all is applied or refused before, and the step tells which.

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
        findings = self._replicas.union(self._findings(loss))
        refuse = findings.any()
        self._apply(refuse)
        self._skipped = self._skipped.to(refuse.device).add_(refuse)
        if not self.skip_nonfinite and refuse:
            changed = "step refused, nothing was changed"
            if self._mode == "backward":
                changed = "update refused, in these layers, or in all for a loss, and in float parameters"
            raise NonFiniteError(
                f"{changed}: {', '.join(self._describe(findings.tolist()))} not finite; "
                "lower the learning rate or look for the cause, or let skip_nonfinite=True skip such steps"
            )
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # of the base class
        """Drop every gradient: what is staged, kept or flagged. ``set_to_none`` is for the float optimizer, if any."""
        for layer in self._layers.values():
            layer.release_hooks()
        self._clear()

    def overflow(self) -> Tensor:
        """What `Overflow` says: float32 [1], infinite if a gradient that was not applied yet is not finite, else 0."""
        findings = self._replicas.union(TernaryOptimizer._findings(self, None))
        return torch.where(findings.any(), math.inf, 0.0).to(torch.float32).reshape(1)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; a layer's entry is its ``rng`` (seed, layer, step) and the number of refused steps."""
        for parameter, layer in self._layers.items():
            self.state[parameter] = {"rng": self._replicas.shared(layer.rng), "skipped_steps": self._skipped}
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, which drives the layers that are copied along with it."""
        return super().__getstate__() | {name: getattr(self, name) for name in self._COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:
            # A copy, whose layers brought their state along.
            self._overflow.owner = self
            return
        for parameter, layer in self._layers.items():
            saved = self.state.pop(parameter, {})
            if "rng" not in saved:
                raise CheckpointError(
                    f"the optimizer state has no 'rng' for layer {layer.name!r}: load one that this optimizer saved"
                )
            layer.rng.copy_(saved["rng"])
            self._replicas.own(layer.rng)
            self._skipped = saved["skipped_steps"].clone()
        self._write_rates()

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[TernaryLinear]]]:
        """The ternary groups with their layers."""
        for group in self.param_groups:
            layers = [self._layers[parameter] for parameter in group["params"] if parameter in self._layers]
            if layers:
                yield group, layers

    def _refusals(self) -> list[Tensor]:
        """The flags that refuse updates inside backward, each once."""
        flags = [layer.refuse for layer in self._layers.values()]
        return list({id(flag): flag for flag in flags if flag is not None}.values())

    def _write_rates(self) -> None:
        """Bring learning rates that were put into a group to where backward reads them."""
        for group, layers in self._groups():
            rate = layers[0].lr
            if rate is None:
                return
            for layer in layers:
                if layer.lr is not None and layer.lr is not group["lr"]:
                    layer.lr.fill_(group["lr"])
            group["lr"] = rate

    def _clear(self) -> None:
        """Empty every stage, status and flag."""
        # Its status counts no micro-batch then, and the next one writes over the integers of the stage.
        names = [name for name in (*STAGE, "status") if name != "stage"]
        left = [getattr(layer, name) for layer in self._layers.values() for name in names]
        torch._foreach_zero_([tensor for tensor in left if tensor is not None] + self._refusals())
        self._write_rates()

    def _findings(self, loss: Tensor | float | None) -> Tensor:
        """What was not finite here: int32, one entry a layer and one for the loss, 0 where all is well."""
        # Everything here stays on the device; layers on other devices send their flag to the first one's.
        layers = self._layers.values()
        device = next(iter(layers)).status.device
        if not isinstance(loss, Tensor):
            loss = torch.full((), 0.0 if loss is None else loss, device=device)
        of_loss = (~torch.isfinite(loss).all()).to(torch.int32) * NONFINITE_LOSS
        for flag in self._refusals():
            of_loss = of_loss | flag[0].to(of_loss.device, non_blocking=True)
        found = [hooked.findings(layer) if self._mode == "hooks" else layer.status[0] for layer in layers]
        return torch.stack([flag.to(device, non_blocking=True) for flag in (*found, of_loss)])

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
        if self._mode == "backward":
            self._clear()
            return
        settings: dict[TernaryLinear, tuple[Any, ...]] = {}
        for group, layers in self._groups():
            device = layers[0].status.device
            lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.full((), group["lr"], device=device)
            rate = lr.to(device, torch.float32, non_blocking=True)
            # An accumulator may rest on its threshold: without this even an update of nothing could step a trit.
            drop = refuse.to(device, non_blocking=True) | (rate <= 0)
            settings |= dict.fromkeys(layers, (drop.to(torch.int32).reshape(1), rate, group))
        for layer in self._replicas.summed(self._staged(settings)):
            self._commit(layer, *settings[layer])
            if self._mode == "hooks":
                layer.release_stage()
        for _, layers in self._groups():
            steps = (~refuse).to(layers[0].rng.device, torch.int64, non_blocking=True)
            torch._foreach_add_([layer.rng[2] for layer in layers], [steps] * len(layers))
            torch._foreach_zero_([layer.status for layer in layers])

    def _staged(self, layers: Iterable[TernaryLinear]) -> Iterator[TernaryLinear]:
        for layer in layers:
            if self._mode == "hooks":
                hooked.stage_hooks(layer)
            yield layer

    def _commit(self, layer: TernaryLinear, drop: Tensor, rate: Tensor, group: dict[str, Any]) -> None:
        torch.ops.ternarize.update_commit(
            layer.T_packed,
            layer.E,
            layer.T_accum,
            layer.T_momentum,
            layer.E_accum,
            layer.row_log2,
            layer.col_log2,
            self._replicas.shared(layer.rng),
            layer.stage,
            layer.stage_E,
            layer.stage_row,
            layer.stage_col,
            layer.status,
            drop,
            rate,
            group["threshold"],
            group["exponent_threshold"],
            layer.group_size,
            layer.rule,
        )
