"""Adaptive sweeps: rounds of the runs that would tell most, until the learning rates or a critical batch are known."""
