"""harmbench-vaccine: any defense against any harmful fine-tuning attack, under one protocol."""

__version__ = "0.1.0"
