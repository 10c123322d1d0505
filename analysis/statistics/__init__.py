"""Arrays in, numbers out: fits, noise, intervals; no names of optimizers, no tables."""
