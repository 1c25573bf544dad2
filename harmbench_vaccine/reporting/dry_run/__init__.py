"""The stages and the cost of a run, without running it."""
