"""From records to estimates: critical batch sizes, token ratios, compute-time frontiers; imports no torch."""
