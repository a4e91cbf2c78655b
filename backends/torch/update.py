"""The integer update of a ternary layer, in two halves, as plain tensor code: the definition of the ops.

`update_stage` runs in backward: a strip at a time, it forms G = grad_yᵀ · x, turns it into small integers, adds those
to the layer's stage and drops the strip; the first micro-batch writes over what an earlier step left there.
`update_commit` runs in the optimizer's step: it applies what is staged to the trits, or leaves every integer as it was
if the step is refused. `update_apply` is both, one after the other, in backward. Nothing here synchronises with the
device.

Rules
    factored  u = clamp(SR(G · sqrt(mean(r) / (r_n · c_k))), -4, 4), Adafactor's factored second moment (Shazeer and
              Stern, 2018, arXiv:1804.04235) with r, c of the previous steps; then an integer momentum and an integer
              accumulator whose remainder is carried. docs/training.md states it and how its constants were found.
    sign      u = sign(G); the accumulator counts votes, a trit steps at the threshold and its accumulator returns to 0.
SR is stochastic rounding, floor(v + uniform), with the counter-based bits of `ternarize.philox`. What is rounded is an
int32 in units of 2^-16, and so is all of a commit: devices cannot disagree about it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ternarize.packing import E_MAX, E_MIN, groups_per_row, pack, row_strips, unpack
from ternarize.philox import FRACTION_BITS, commit_bits, gradient_bits, round_off, to_fixed

#: Bits of status[0].
NONFINITE_OUTPUT, NONFINITE_GRADIENT, NONFINITE_LOSS = 1, 2, 4

#: row_log2 and col_log2 before the first step.
NO_STATISTICS = -(2**15)

STATISTICS_DECAY, CLIP = 0.95, 4.0

#: 1 in fixed point, and what a step keeps of a momentum: 0.9 of it, to 16 bits.
ONE = 2**FRACTION_BITS
MOMENTUM_KEPT = round(0.9 * ONE)

#: The largest step in fixed point: an int8 times it, plus an int8 times `ONE`, is an int32. Of any accumulator a unit
#: of half of it makes a trit step.
MAX_STEP = 2**24 - 1

#: theta, S and M_max of the two forms of `factored` (docs/training.md).
FORMS = {"int8": (127, 64, 127), "int4": (7, 4, 7)}


def normalisers(row_log2: Tensor, col_log2: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(mean(r) / (r_n · c_k)) as a product of a row and a column factor; zeros before the first statistics.

    Args:
        row_log2: int16 [N], 256 · log2 of the running mean of G² over each row.
        col_log2: int16 [K], likewise over each column.

    Returns:
        float32 [N] and float32 [K].
    """
    row, col = row_log2.to(torch.float64) / 256, col_log2.to(torch.float64) / 256
    known = row_log2[:1] != NO_STATISTICS
    row_factor = torch.exp2(0.5 * (torch.log2(torch.exp2(row).mean()) - row))
    return (row_factor * known).to(torch.float32), torch.exp2(-0.5 * col).to(torch.float32)


def merge_statistics(log2: Tensor, mean_square: Tensor) -> Tensor:
    """The running mean of squares, in the linear domain, kept as int16 logarithms in 1/256; the first step fills it."""
    new = mean_square.to(torch.float64)
    old = torch.exp2(log2.to(torch.float64) / 256)
    merged = torch.where(log2 == NO_STATISTICS, new, STATISTICS_DECAY * old + (1 - STATISTICS_DECAY) * new)
    return torch.round(256 * torch.log2(merged.clamp_min(1e-37))).clamp(-32767, 32767).to(torch.int16)


def update_stage(
    grad_y: Sequence[Tensor],
    x: Tensor,
    T_packed: Sequence[Tensor],
    row_log2: Sequence[Tensor],
    col_log2: Sequence[Tensor],
    rng: Sequence[Tensor],
    stage: Sequence[Tensor],
    stage_E: Sequence[Tensor],
    stage_row: Sequence[Tensor],
    stage_col: Sequence[Tensor],
    status: Sequence[Tensor],
    group_size: int,
    rule: str,
) -> None:
    """Add one micro-batch's integers to the stage of some layers that share x; see `ternarize.ops` for shapes."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = x.reshape(-1, x.shape[-1]).to(accumulate)
    in_features = x.shape[-1]
    for i, gradient in enumerate(grad_y):
        rows_first = gradient.reshape(-1, gradient.shape[-1]).to(accumulate).t()
        if rule == "factored":
            row_factor, col_factor = normalisers(row_log2[i], col_log2[i])
        for rows in row_strips(stage[i].shape[0], in_features):
            G = (rows_first[rows] @ inputs).to(torch.float32)
            status[i][0] |= (~torch.isfinite(G).all()).to(torch.int32) * NONFINITE_GRADIENT
            G = torch.nan_to_num(G, 0.0, 0.0, 0.0)
            if rule == "factored":
                z = (G * row_factor[rows, None] * col_factor).clamp(-CLIP, CLIP)
                u = round_off(to_fixed(z), gradient_bits(rng[i], status[i][1], rows, in_features))
                square = G.square()
                stage_row[i][rows] += square.sum(1)
                stage_col[i] += square.sum(0)
            else:
                u = torch.sign(G)
            # For the first micro-batch nothing: what is there belongs to an earlier step.
            staged = stage[i][rows].masked_fill(status[i][1] == 0, 0)
            stage[i][rows] = (staged.to(torch.int16) + u.to(torch.int16)).clamp(-127, 127).to(torch.int8)
            if stage_E:
                T = unpack(T_packed[i][rows], in_features, group_size)
                slope = sum_groups(G * T, group_size)
                votes = stage_E[i][rows].to(torch.int16) + torch.sign(slope).to(torch.int16)
                stage_E[i][rows] = votes.clamp(-127, 127).to(torch.int8)
        status[i][1] += 1


def sum_groups(values: Tensor, group_size: int) -> Tensor:
    """[..., K] to [..., G]: sums over the groups of a row."""
    in_features = values.shape[-1]
    groups = groups_per_row(in_features, group_size)
    size = in_features if groups == 1 else group_size
    padded = torch.nn.functional.pad(values, (0, groups * size - in_features))
    return padded.reshape(*values.shape[:-1], groups, size).sum(-1)


def update_commit(
    T_packed: Tensor,
    E: Tensor,
    T_accum: Tensor,
    T_momentum: Tensor | None,
    E_accum: Tensor | None,
    row_log2: Tensor | None,
    col_log2: Tensor | None,
    rng: Tensor,
    stage: Tensor,
    stage_E: Tensor | None,
    stage_row: Tensor | None,
    stage_col: Tensor | None,
    status: Tensor,
    refuse: Tensor,
    lr: Tensor,
    threshold: int,
    exponent_threshold: int,
    group_size: int,
    rule: str,
) -> None:
    """Apply the stage of one layer, unless it is of no micro-batch or ``refuse`` is set; drop its sums and votes.

    ``status`` stays as it is: the caller clears it, for all layers at once.
    """
    in_features = T_accum.shape[1]
    count = status[1]
    active = (refuse == 0) & (count > 0)
    for rows in row_strips(T_accum.shape[0], in_features):
        T = unpack(T_packed[rows], in_features, group_size).to(torch.int32)
        old_momentum = None if T_momentum is None else T_momentum[rows]
        for_momentum, for_accum = commit_bits(rng, rows, in_features)
        staged = stage[rows].to(torch.int32)
        if rule == "factored":
            new_T, accum, momentum = factored_rule(
                T, T_accum[rows], old_momentum, staged, count, lr, for_momentum, for_accum
            )
        else:
            new_T, accum = sign_rule(T, T_accum[rows], staged, lr, threshold, for_accum)
            momentum = None
        T_packed[rows] = torch.where(active, pack(new_T.to(torch.int8), group_size), T_packed[rows])
        T_accum[rows] = torch.where(active, accum, T_accum[rows])
        if T_momentum is not None and momentum is not None:
            T_momentum[rows] = torch.where(active, momentum, T_momentum[rows])
    commit_groups_and_vectors(
        E, E_accum, row_log2, col_log2, stage_E, stage_row, stage_col, status, active, exponent_threshold
    )


def update_apply(
    grad_y: Sequence[Tensor],
    x: Tensor,
    T_packed: Sequence[Tensor],
    E: Sequence[Tensor],
    T_accum: Sequence[Tensor],
    T_momentum: Sequence[Tensor],
    E_accum: Sequence[Tensor],
    row_log2: Sequence[Tensor],
    col_log2: Sequence[Tensor],
    rng: Sequence[Tensor],
    status: Sequence[Tensor],
    refuse: Sequence[Tensor],
    lr: Sequence[Tensor],
    threshold: int,
    exponent_threshold: int,
    group_size: int,
    rule: str,
    *,
    halves: tuple[Callable[..., None], Callable[..., None]] = (update_stage, update_commit),
) -> None:
    """Stage and commit the gradients of some layers that share x, with a stage that lives no longer than its layer.

    A layer whose ``refuse`` or whose own status is set changes nothing, and its status stays set. A backend gives its
    own ``halves``, `update_stage` and `update_commit`; for the rest see `ternarize.ops`.
    """
    stage_half, commit_half = halves
    for i, gradient in enumerate(grad_y):
        momentum, exponents, row, col = (planes[i : i + 1] for planes in (T_momentum, E_accum, row_log2, col_log2))
        stage = torch.empty_like(T_accum[i])
        stage_E, stage_row, stage_col = (
            [torch.zeros(vector.shape, dtype=dtype, device=x.device) for vector in vectors]
            for vectors, dtype in ((exponents, torch.int8), (row, torch.float32), (col, torch.float32))
        )
        staged = ([stage], stage_E, stage_row, stage_col, [status[i]])
        stage_half([gradient], x, [T_packed[i]], row, col, [rng[i]], *staged, group_size, rule)
        refused = (refuse[i] | status[i][:1]).ne(0)
        commit_half(
            T_packed[i],
            E[i],
            T_accum[i],
            *(next(iter(planes), None) for planes in (momentum, exponents, row, col)),
            rng[i],
            *(next(iter(tensors), None) for tensors in staged),
            (refused | (lr[i] <= 0)).to(torch.int32),
            lr[i],
            threshold,
            exponent_threshold,
            group_size,
            rule,
        )
        # What was not finite is for the optimizer to read.
        status[i][1:].zero_()
        rng[i][2:] += ~refused


def commit_groups_and_vectors(
    E: Tensor,
    E_accum: Tensor | None,
    row_log2: Tensor | None,
    col_log2: Tensor | None,
    stage_E: Tensor | None,
    stage_row: Tensor | None,
    stage_col: Tensor | None,
    status: Tensor,
    active: Tensor,
    exponent_threshold: int,
) -> None:
    """The part of a commit that is not one integer a weight: exponents, statistics, and clearing their stage."""
    if E_accum is not None and stage_E is not None:
        new_E, accum = exponent_rule(E, E_accum, stage_E, exponent_threshold)
        E.copy_(torch.where(active, new_E, E))
        E_accum.copy_(torch.where(active, accum, E_accum))
    commit_statistics(row_log2, col_log2, stage_row, stage_col, status, active)
    for staged in (stage_E, stage_row, stage_col):
        if staged is not None:
            staged.zero_()


def fixed_step(lr: Tensor, unit: float) -> Tensor:
    """int32 of lr · unit in units of 2^-16, at most `MAX_STEP`."""
    return torch.floor(lr * unit * ONE + 0.5).clamp_max(MAX_STEP).to(torch.int32)


def factored_rule(
    T: Tensor,
    T_accum: Tensor,
    T_momentum: Tensor | None,
    staged: Tensor,
    count: Tensor,
    lr: Tensor,
    for_momentum: Tensor,
    for_accum: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One step of `factored` for a strip.

    Args:
        T: int32 trits.
        T_accum: int8; without T_momentum, accumulator and momentum in its low and high nibble.
        T_momentum: int8 or None.
        staged: int32, the sum of u.
        count: int32 scalar, over how many micro-batches.
        lr: float32 of one element, fraction of a trit per unit of momentum.
        for_momentum: int32, 16 random bits each.
        for_accum: likewise.

    Returns:
        New trits (int32), T_accum (int8) and T_momentum (int8, or None as given).
    """
    theta, unit, limit = FORMS["int4" if T_momentum is None else "int8"]
    if T_momentum is None:
        accum, momentum = ((T_accum << 4) >> 4).to(torch.int32), (T_accum >> 4).to(torch.int32)
    else:
        accum, momentum = T_accum.to(torch.int32), T_momentum.to(torch.int32)
    # To nearest.
    pull = (2 * unit * (ONE - MOMENTUM_KEPT) + count) // (2 * count.clamp_min(1))
    momentum = round_off(momentum * MOMENTUM_KEPT + staged * pull, for_momentum).clamp(-limit, limit)
    accum = round_off(accum * ONE - momentum * fixed_step(lr, 2 * theta / unit), for_accum)
    # With nibbles a step needs more than theta: else every weight on the boundary toggles.
    bar = theta + 1 if T_momentum is None else theta
    new_T = (T + (accum >= bar).to(torch.int32) - (accum <= -bar).to(torch.int32)).clamp(-1, 1)
    accum = (accum - 2 * theta * (new_T - T)).clamp(-theta, theta)
    if T_momentum is None:
        return new_T, ((accum & 15) | (momentum << 4)).to(torch.int8), None
    return new_T, accum.to(torch.int8), momentum.to(torch.int8)


def sign_rule(
    T: Tensor, T_accum: Tensor, votes: Tensor, lr: Tensor, threshold: int, for_accum: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of `sign` for a strip: T_accum loses SR(lr · votes), steps a trit at the threshold and returns to 0.

    Returns:
        New trits (int32) and T_accum (int8).
    """
    accum = round_off(T_accum.to(torch.int32) * ONE - votes * fixed_step(lr, 1.0), for_accum)
    step = (accum >= threshold).to(torch.int32) - (accum <= -threshold).to(torch.int32)
    return (T + step).clamp(-1, 1), accum.masked_fill(step != 0, 0).clamp(-127, 127).to(torch.int8)


def exponent_rule(E: Tensor, E_accum: Tensor, votes: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    """The sign rule for exponents, under either rule of the trits: new E and E_accum, both int8."""
    accum = E_accum.to(torch.int32) - votes
    step = (accum >= threshold).to(torch.int32) - (accum <= -threshold).to(torch.int32)
    new_E = (E + step).clamp(E_MIN, E_MAX).to(torch.int8)
    return new_E, accum.masked_fill(step != 0, 0).clamp(-127, 127).to(torch.int8)


def commit_statistics(
    row_log2: Tensor | None,
    col_log2: Tensor | None,
    stage_row: Tensor | None,
    stage_col: Tensor | None,
    status: Tensor,
    active: Tensor,
) -> None:
    """Merge the staged sums of G² into the running statistics, where ``active``; for rules without, do nothing."""
    if row_log2 is None or col_log2 is None or stage_row is None or stage_col is None:
        return
    samples = status[1].clamp_min(1).to(torch.float64)
    rows, columns = stage_row.numel(), stage_col.numel()
    new_row = merge_statistics(row_log2, stage_row / (samples * columns))
    new_col = merge_statistics(col_log2, stage_col / (samples * rows))
    row_log2.copy_(torch.where(active, new_row, row_log2))
    col_log2.copy_(torch.where(active, new_col, col_log2))
