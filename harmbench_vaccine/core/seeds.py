"""Independent random streams, all derived from one seed."""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *purpose: object) -> int:
    """Derive a seed for one purpose.

    Args:
        seed: The seed of the run or of a stage.
        *purpose: Words and numbers that name the purpose.

    Returns:
        A number below 2**31, a pure function of the arguments.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def random_stream(seed: int, *purpose: object) -> random.Random:
    """Return a Python random generator, seeded for one purpose (see `derive_seed`)."""
    return random.Random(derive_seed(seed, *purpose))
