"""How `torch.amp.GradScaler` learns that a ternary gradient was not finite."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ternarize.optim.ternary import TernaryOptimizer


class Overflow(Tensor):
    """An empty parameter whose gradient is infinite if that of any ternary layer is not finite, else zero.

    A GradScaler looks for overflow in the gradients of an optimizer's parameters, and integers have none. This one
    stands for them in the param groups. Its gradient is computed when it is asked for, so it costs nothing without a
    scaler, and is the same on every rank.
    """

    owner: "TernaryOptimizer"

    # Operators give plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's subclasses do

    @staticmethod
    def __new__(cls) -> "Overflow":
        """Without an owner."""
        return torch.Tensor._make_subclass(cls, torch.empty(0))

    @property
    def grad(self) -> Tensor:
        """float32 [1]."""
        return self.owner.overflow()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        """Dropped: `TernaryOptimizer.zero_grad` clears where it comes from."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Overflow":
        """Without an owner: the copied optimizer makes itself that."""
        twin = memo[id(self)] = Overflow()
        return twin

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Likewise."""
        return Overflow, ()
