"""Optimizers, one file an algorithm; `combined` holds the single one that Lightning sees."""
