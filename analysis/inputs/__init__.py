"""Where the numbers come from: records of sweeps, and tables from outside."""
