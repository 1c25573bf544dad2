"""Models in memory: loading, generation engines, judge models."""
