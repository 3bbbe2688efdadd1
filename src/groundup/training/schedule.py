"""Learning-rate schedules as closed forms of (step, total): nothing to restore, nothing that depends on how a run was interrupted.

Every schedule gives a factor of the base learning rate; warmup, a linear rise over the first share of the run, goes with all of them.
"""

from __future__ import annotations

import math

from groundup.core.recipe import Schedule


def factor(config: Schedule, step: int, total: int) -> float:
    """The learning rate's factor for the update that follows `step` finished ones, of `total`.

    constant: 1. step: gamma after every `step_every` share of the run. cosine: half a cosine down to `floor` (Loshchilov and Hutter, arXiv
    1608.03983, eq. 5). one-cycle: up and down again (Smith and Topin, arXiv 1708.07120), with a rise over 0.3 of the run unless `warmup`
    says otherwise; momentum stays. wsd: warmup, stable, then linear decay over the last `decay` share (Hu et al., arXiv 2404.06395, 4.1).
    """
    warmup = config.warmup or (0.3 if config.name == "one-cycle" else 0.0)
    rise = warmup * total
    if step < rise:
        start = 0.04 if config.name == "one-cycle" else 0.0
        return start + (1 - start) * (step + 1) / math.ceil(rise) if rise >= 1 else 1.0
    left = max(total - rise, 1.0)
    at = (step - rise) / left  # 0 after the warmup, 1 at the end
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return config.gamma ** math.floor(step / total / config.step_every + 1e-9)
    if config.name == "wsd":
        begin = 1 - config.decay
        share = step / total
        return 1.0 if share < begin else config.floor + (1 - config.floor) * max(0.0, (1 - share) / config.decay)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * at))
