"""Supervised fine-tuning on the alignment data: the baseline that every defense is compared with.

    w <- w - lr * grad L(w; B_a)

Cost of a step: 1 forward, 1 backward. It has no parameter to tune.

Departures: none.
"""

from harmbench_vaccine.plugins import Defense


class SFT(Defense):
    """Plain supervised fine-tuning: the default of every hook."""
