"""A `torch` that is imported at once and has no GPU."""


class cuda:
    @staticmethod
    def is_available() -> bool:
        return False
