"""Kinds of numbers in settings and protocols, each with its allowed range; pydantic refuses every other value.

They are strict: a text, a truth value or 2.5 is not a whole number, and no number is infinite or NaN.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
"""A number of rows, tokens, layers and the like."""
Positive = Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
"""A share, from 0 to 1."""
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
"""A share from which 1 is excluded."""
Percentage = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
