"""Experiments before evaluation: specification, protocol, settled experiment, rows, keys, training sessions."""
