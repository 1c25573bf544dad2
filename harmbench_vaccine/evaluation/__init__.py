"""Measurements: verdicts, drift, gates, statistics, the typed result and its records."""
