"""The number of examples of a property test: small by default, larger by an environment variable."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """Return `count`, or the number in the environment variable HBV_EXAMPLES."""
    return int(os.environ.get("HBV_EXAMPLES", count))
