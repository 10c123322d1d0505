"""Models of one family and many widths: coordinate checks, transfer of rates, telescoping sweeps."""
