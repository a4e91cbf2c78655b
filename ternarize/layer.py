"""TernaryLinear: a linear layer whose state is integers only."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import torch
import torch._dynamo
from torch import Tensor, nn

from ternarize import guard, kept, ops  # noqa: F401  # importing ops registers torch.ops.ternarize
from ternarize.backends.torch.update import NO_STATISTICS
from ternarize.config import TernaryConfig
from ternarize.errors import ConfigError, ShapeError
from ternarize.packing import ROW, groups_per_row, pack, row_strips, split_planes

#: Parameters that only training needs: `freeze` drops them, inference checkpoints leave them out.
TRAINING_STATE = ("T_accum", "T_momentum", "E_accum", "row_log2", "col_log2")

#: Tensors that live between a backward and the optimizer's step; no parameters, no buffers, never saved.
STAGE = ("stage", "stage_E", "stage_row", "stage_col")

#: When the state changes: `ternarize.TernaryOptimizer` documents it.
Apply = Literal["step", "backward", "hooks"]


def _integers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None, fill: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, fill, dtype=dtype, device=device), requires_grad=False)


class TernaryLinear(nn.Module):
    """y = x · (T · 2^E)ᵀ + bias with T in {-1, 0, 1}, 2 bits a weight.

    Every parameter is an integer tensor that does not require gradients, so that ``model.requires_grad_(True)`` raises;
    `freeze` and `eval` are what stops its training. `ternarize.packing` has the dimension key.
    A new layer holds zeros: `from_levels` and `ternarize.quantize` fill one.

        T_packed       uint8 [N, B], or [P, N, B] with several trit planes
        E              int8 [N, G]
        E_mantissa     uint8, int16 or int32 [N, G], only for imported scales that are no power of two
        bias           int32 [N] with bias_exponent int8 [1]: bias · 2^bias_exponent; fixed in training
        T_accum, T_momentum, E_accum, row_log2, col_log2
                       only if trainable, as rule and form need them (see `ternarize.ops`)

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias.
        config: group size, planes, activation, rule and form.
        trainable: whether to keep the rule's state; only layers of one plane can.
        device: of the parameters.
        dtype: that a dense twin would have; `weight` and `ternarize.dequantize` use it. Casts of the model change it.

    Raises:
        ConfigError: for a trainable layer of several planes.
    """

    T_packed: nn.Parameter
    E: nn.Parameter
    E_mantissa: nn.Parameter | None
    bias: nn.Parameter | None
    bias_exponent: nn.Parameter | None
    T_accum: nn.Parameter | None
    T_momentum: nn.Parameter | None
    E_accum: nn.Parameter | None
    row_log2: nn.Parameter | None
    col_log2: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: TernaryConfig | None = None,
        trainable: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = config or TernaryConfig()
        if trainable and config.planes > 1:
            raise ConfigError(
                f"a layer of {config.planes} trit planes cannot be trainable: use planes=1 or trainable=False"
            )
        device = torch.device(device) if device is not None else None
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        self.rule: str = config.rule
        self.activation: str = config.activation
        # A group longer than the row is the row: one spelling, so that equal layers compare and fuse.
        self.group_size: int = ROW if config.group_size >= in_features else config.group_size
        self.dtype = dtype or torch.get_default_dtype()
        #: Name in its model, for messages.
        self.name = ""
        #: Set by the output guard: this layer's TileLang kernel is not to be trusted (see `ternarize.guard`).
        self.tilelang = True
        #: Phase to the kernel that the last compiled graph chose, with the reason: `ternarize.explain` reads it.
        self.choices: dict[str, tuple[str, str]] = {}

        packed = (out_features, -(-in_features // 4))
        grouped = (out_features, groups_per_row(in_features, self.group_size))
        self.T_packed = _integers(packed if config.planes == 1 else (config.planes, *packed), torch.uint8, device)
        self.E = _integers(grouped, torch.int8, device)
        self.register_parameter("E_mantissa", None)
        self.register_parameter("bias", _integers((out_features,), torch.int32, device) if bias else None)
        self.register_parameter("bias_exponent", _integers((1,), torch.int8, device) if bias else None)
        factored = config.rule == "factored"
        dense = (out_features, in_features)
        wanted: dict[str, nn.Parameter | None] = dict.fromkeys(TRAINING_STATE)
        if trainable:
            wanted["T_accum"] = _integers(dense, torch.int8, device)
            if factored and config.accumulator == "int8":
                wanted["T_momentum"] = _integers(dense, torch.int8, device)
            if factored:
                wanted["row_log2"] = _integers((out_features,), torch.int16, device, NO_STATISTICS)
                wanted["col_log2"] = _integers((in_features,), torch.int16, device, NO_STATISTICS)
            if config.steps_exponents:
                wanted["E_accum"] = _integers(grouped, torch.int8, device)
        for name, parameter in wanted.items():
            self.register_parameter(name, parameter)
        #: What backward does for the optimizer; None until one is made.
        self.update_mode: Apply | None = None
        #: Of an update inside backward: learning rate, the flag that refuses it everywhere, both thresholds.
        self.lr: Tensor | None = None
        self.refuse: Tensor | None = None
        self.thresholds = (0, 0)
        #: Under apply="hooks": [M, N] and [M, K] of each backward since the last step.
        self._hook_grad_2d: list[Tensor] = []
        self._hook_x_2d: list[Tensor] = []
        self.stage: Tensor | None = None
        self.stage_E: Tensor | None = None
        self.stage_row: Tensor | None = None
        self.stage_col: Tensor | None = None
        self._reset_transients()

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,
        E: Tensor,
        *,
        config: TernaryConfig,
        E_mantissa: Tensor | None = None,
        bias: Tensor | None = None,
        bias_exponent: Tensor | None = None,
        T_accum: Tensor | None = None,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer with given weights.

        Args:
            levels: int8 [N, K], integers of magnitude up to (3^P - 1) / 2.
            E: int8 [N, G].
            config: as for the class.
            E_mantissa: integers that broadcast to [N, G].
            bias: int32 [N], with ``bias_exponent``.
            bias_exponent: int8 [1].
            T_accum: int8 [N, K], the start of the accumulators of a trainable layer; zeros if None.
            trainable: as for the class.
            dtype: as for the class.
        """
        out_features, in_features = levels.shape
        layer = cls(
            in_features,
            out_features,
            bias is not None,
            config=config,
            trainable=trainable,
            device=levels.device,
            dtype=dtype,
        )
        # A strip of rows at a time: planes and codes of a whole weight would take several times its bytes.
        for rows in row_strips(out_features, in_features):
            T = levels[rows] if config.planes == 1 else split_planes(levels[rows], config.planes)
            layer.T_packed[..., rows, :] = pack(T, layer.group_size)
        if E.shape != layer.E.shape:
            raise ShapeError(f"E is {list(E.shape)}, need {list(layer.E.shape)} for {in_features} weights a row")
        layer.E.copy_(E)
        if E_mantissa is not None:
            layer.E_mantissa = nn.Parameter(E_mantissa, requires_grad=False)
        if (
            layer.bias is not None
            and layer.bias_exponent is not None
            and bias is not None
            and bias_exponent is not None
        ):
            layer.bias.copy_(bias)
            layer.bias_exponent.copy_(bias_exponent)
        if layer.T_accum is not None and T_accum is not None:
            layer.T_accum.copy_(T_accum)
        return layer

    @property
    def trainable(self) -> bool:
        """Whether the layer has the state that an update needs."""
        return self.T_accum is not None

    @property
    def planes(self) -> int:
        """P, the number of trit planes."""
        return self.T_packed.shape[0] if self.T_packed.dim() == 3 else 1

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K] in `dtype`, formed anew each time: for code that reads a linear layer's weight."""
        dense: Tensor = torch.ops.ternarize.dequantize(
            self.T_packed, self.E, self.E_mantissa, self.in_features, self.group_size, self.dtype
        )
        return dense

    def _reset_transients(self) -> None:
        """Make the tensors that graphs take as inputs but no checkpoint holds; before tracing, never inside a graph."""
        device = self.T_packed.device
        self.anchor = torch.zeros(0, device=device, requires_grad=True)
        self.status = torch.zeros(2, dtype=torch.int32, device=device)
        # The optimizer keeps its seed and step here: they move along, as its parameters do.
        rng: Tensor = getattr(self, "rng", torch.zeros(3, dtype=torch.int64, device=device))
        self.rng = torch.zeros_like(rng, device=device) if rng.is_meta else rng.to(device)
        self.release_hooks()
        if self.stage is not None:
            self.allocate_stage()
        for name in ("lr", "refuse"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        self._announce()

    def _announce(self) -> None:
        """Tell the output guard whose status this is, and Dynamo that the transients keep their sizes and addresses.

        Dynamo takes parameters to be static, but with dynamic=True it would trace other tensors with symbolic sizes,
        and take a batch of 2 and the 2 entries of a status for the same symbol. CUDA graphs would be replayed on copies
        of them, or, as graphs write to them, not be used at all.
        """
        guard.register(self)
        if self.update_mode == "hooks":
            kept.register(self)
        for name in ("anchor", "status", "rng", "lr", "refuse", *STAGE):
            tensor = getattr(self, name)
            if tensor is not None:
                torch._dynamo.mark_static(tensor)
                torch._dynamo.mark_static_address(tensor, guard=False)

    def prepare_training(
        self,
        apply: Apply = "step",
        *,
        lr: Tensor | None = None,
        refuse: Tensor | None = None,
        threshold: int = 0,
        exponent_threshold: int = 0,
    ) -> None:
        """Say what backward does with a gradient, and allocate what it needs for that.

        Args:
            apply: "step" takes a stage, 8 bits a weight, that the optimizer's step applies; the others take none.
            lr: float32 of one element, for "backward"; read there, and kept as this tensor.
            refuse: int32 [1], for "backward": where it is set, no update is made. Layers of one optimizer share it.
            threshold: of the optimizer, for "backward".
            exponent_threshold: likewise.

        Raises:
            ConfigError: for a layer without training state.
        """
        if self.T_accum is None:
            raise ConfigError(
                f"layer {self.name!r} keeps no training state: make it with trainable=True, "
                "or leave it out of the optimizer"
            )
        self.update_mode, self.lr, self.refuse = apply, lr, refuse
        self.thresholds = (threshold, exponent_threshold)
        self.release_stage()
        if apply == "step":
            self.allocate_stage()
        self._announce()

    def allocate_stage(self) -> None:
        """A stage of no micro-batch."""
        assert self.T_accum is not None
        device = self.T_packed.device
        self.stage = torch.zeros(self.T_accum.shape, dtype=torch.int8, device=device)
        self.stage_E = None if self.E_accum is None else torch.zeros_like(self.E_accum)
        if self.rule == "factored":
            self.stage_row = torch.zeros(self.out_features, dtype=torch.float32, device=device)
            self.stage_col = torch.zeros(self.in_features, dtype=torch.float32, device=device)

    def release_stage(self) -> None:
        """Drop the stage."""
        for name in STAGE:
            setattr(self, name, None)

    def keep_hooks(self, grad_2d: Tensor, x_2d: Tensor) -> None:
        """Keep a backward's gradient [M, N] and input [M, K] for the optimizer's step."""
        self._hook_grad_2d.append(grad_2d)
        self._hook_x_2d.append(x_2d)

    def hooks(self) -> tuple[list[Tensor], list[Tensor]]:
        """What was kept since the last step: [M, N] and [M, K] of each backward."""
        return self._hook_grad_2d, self._hook_x_2d

    def release_hooks(self) -> None:
        """Drop what was kept."""
        self._hook_grad_2d, self._hook_x_2d = [], []

    def freeze(self) -> None:
        """Drop the training state; the layer stays differentiable in its input."""
        for name in TRAINING_STATE:
            setattr(self, name, None)
        self.update_mode = self.lr = self.refuse = None
        self.release_stage()
        self.release_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copied or unpickled layer, whose tensors are new ones."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self._announce()

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        device = self.T_packed.device
        # A cast of the model is one of the dense twin: an empty tensor tells what it does to floats.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of torch
        if self.T_packed.device != device:
            self._reset_transients()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in the dtype of x, or of autocast where it is on."""
        # The packed row alone cannot tell a K from the next three.
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"layer {self.name!r} got an input of shape {list(x.shape)}: its last dimension must be in_features, "
                f"{self.in_features}"
            )
        # Autocast knows no meta device and raises when asked about it.
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weights = ([self.T_packed], [self.E], [self.E_mantissa], [self.bias], [self.bias_exponent])
        outputs: list[Tensor]
        if self.update_mode is not None and self.training and torch.is_grad_enabled():
            # An update inside backward needs all of the state, the others what backward reads of it.
            at_once = self.update_mode == "backward"
            outputs = torch.ops.ternarize.linear_train(
                x,
                self.anchor,
                *weights,
                _present(self.T_accum if at_once else None),
                _present(self.T_momentum if at_once else None),
                _present(self.E_accum if at_once else None),
                _present(self.row_log2),
                _present(self.col_log2),
                [self.rng],
                _present(self.stage),
                _present(self.stage_E),
                _present(self.stage_row),
                _present(self.stage_col),
                [self.status],
                _present(self.refuse),
                _present(self.lr),
                *self.thresholds,
                self.group_size,
                self.activation,
                self.rule,
                self.update_mode,
            )
        else:
            outputs = torch.ops.ternarize.linear(
                x, *weights, [self.status], self.group_size, self.activation, self.tilelang
            )
        return outputs[0]

    def extra_repr(self) -> str:
        """In the manner of nn.Linear, with what is ternary about the layer."""
        group = "row" if self.group_size == ROW else self.group_size
        activation = "" if self.activation == "float" else f", activation={self.activation}"
        training = f", rule={self.rule}" if self.trainable else ", frozen"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={group}, planes={self.planes}{activation}{training}"
        )


def _present(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def ternary_layers(model: nn.Module) -> Iterator[tuple[str, TernaryLinear]]:
    """Qualified names and ternary layers of a model, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, TernaryLinear):
            yield name, module
