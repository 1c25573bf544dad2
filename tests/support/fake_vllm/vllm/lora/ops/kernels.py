def shrink(dtype: str = "float32") -> None:
    assert dtype in ["float16", "bfloat16"]
