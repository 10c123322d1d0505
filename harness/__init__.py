"""Train one run: a decoder-only language model, a fixed token budget, an exact global batch."""
