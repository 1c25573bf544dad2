def attend(dtype: str = "float32") -> None:
    assert dtype != "float32"
