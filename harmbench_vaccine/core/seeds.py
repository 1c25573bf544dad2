"""Random streams that are independent of one another, all from one seed."""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose: a pure function of the run's seed and the words, below 2**31."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def random_stream(seed: int, *purpose: object) -> random.Random:
    """Python's generator, seeded for one purpose."""
    return random.Random(derive_seed(seed, *purpose))
