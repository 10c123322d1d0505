"""Train one run: a decoder-only language model, a fixed token budget, an exact global batch."""

#: Exit status of a process that a signal stopped once its run had a checkpoint (sysexits.h: try again later).
STOPPED = 75
