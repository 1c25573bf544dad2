"""No defense at all: the user's data meets the base model, which was never aligned."""

from typing import ClassVar

from harmbench_vaccine.plugins import Defense


class NoAlignment(Defense):
    """Leaves the alignment stage out."""

    trains: ClassVar[bool] = False
    cost: ClassVar[str] = "none"
