"""Types, errors, seeds, paths, progress, the store and multi-process training: imported by every other room."""
