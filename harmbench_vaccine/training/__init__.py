"""One training stage: the trainer, LoRA adapters, hidden-state taps, sharding."""
