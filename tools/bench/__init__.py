"""What the benchmarks share: models and prompts of a given size, clocks, the bare parts of a step, whole steps."""
