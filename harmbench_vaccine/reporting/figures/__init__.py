"""Figures of comparisons and of runs, all in one style."""
