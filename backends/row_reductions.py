"""Reductions of rows in Inductor's kernels, as rounding activations to int8 needs them: one kernel, which reads x once.

Of rows of more than 1024 values Inductor reads what it reduces, and reads it again for what it does with the result;
and of few rows of more than 8192 values it makes a kernel for parts of rows, one that reduces the parts, and one more.
Rows of a layer's input fit into the registers of a block: a graph of int8 activations is faster if they stay there
(docs/figures.md).
"""

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

#: Most values of a row that a block keeps in registers, and most that one kernel reduces; on an H200.
_MOST_KEPT, _MOST_WHOLE = 2**14, 2**15


class RowReductions(InductorChoices):
    """Inductor's own choices, but for rows of activations."""

    @staticmethod
    def should_use_persistent_reduction(features: SIMDKernelFeatures, cooperative_reduction: bool) -> bool:
        """Whether a kernel keeps what it reduces in registers."""
        allowed = config.triton.persistent_reductions and features.get_reduction_hint() == ReductionHint.INNER
        if allowed and V.graph.sizevars.statically_known_leq(features.reduction_numel, _MOST_KEPT):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    @staticmethod
    def reduction_split_factor(
        device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool
    ) -> int:
        """Into how many parts a reduction is split, which another kernel adds up."""
        if inner_reduction and reduction_numel_hint <= _MOST_WHOLE:
            return 1
        return InductorChoices.reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction)
