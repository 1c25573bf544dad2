def LoRARequest(name: str, number: int, path: str) -> tuple[str, int, str]:
    return name, number, path
