"""Optimizers for integer weights: torch.optim.Optimizer subclasses over the parameters of ternary layers.

Backward leaves small integers in each layer's stage; `TernaryOptimizer.step` applies them all or, if anything was not
finite, none of them. `build_optimizer` puts a float optimizer for the rest of the model under the same refusal.
"""

from ternarize.optim.joint import JointOptimizer as JointOptimizer
from ternarize.optim.joint import build_optimizer as build_optimizer
from ternarize.optim.ternary import DEFAULT_LR as DEFAULT_LR
from ternarize.optim.ternary import TernaryOptimizer as TernaryOptimizer
