"""Names that a user may give: definitions of the critical batch, error models, kinds of files. Imports nothing."""

#: Definitions that T(B) gives, in the order of the tables.
DEFINITIONS_OF_TOKENS = (
    "emin_over_smin", "overhead_20pct", "token_optimal", "token_optimal_5pct", "piecewise_kink", "free_exponent",
)  # fmt: skip
#: All definitions; the last two need branched runs, and gradient norms.
DEFINITIONS = (*DEFINITIONS_OF_TOKENS, "branched", "noise_scale")

RESIDUALS = ("log", "raw_tokens", "raw_steps")
LOSSES = ("squares", "soft_l1", "huber")

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
