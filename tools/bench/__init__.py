"""Shared parts of the benchmarks: models and prompts, clocks, bare parts of a step, whole steps."""
