class OutOfMemoryError(RuntimeError):
    pass


def capture() -> None:
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")
