"""The settled experiment: specification, protocol, rows, keys and training sessions."""
