"""What every word of the report's tables means: quantities, definitions, protocols, parts of the ratio, verdicts.

`{level}` stands for the level of the intervals; line breaks mean nothing.
"""

QUANTITIES: dict[str, str] = {
    "Global batch": """
        Tokens per optimizer step, over all devices and accumulation.""",
    "Units": """
        A power of two from 1024 on is exact and written in binary units without decimals: 1K is 1024, 1M is 1024².
        Everything else has three digits in decimal units: 1.00K is 1000. Axes of tokens have decimal ticks, the
        axis of batches binary ones. Tables of runs write every integer in full.""",
    "Tokens to target, T": """
        Training tokens until the validation loss first is at or below the target, interpolated between evaluations.
        A run that stops above the target is censored, never counted as a number.""",
    "Token ratio, R": """
        Tokens of the baseline over tokens of the challenger at the same batch, target and protocol. arXiv
        2505.02222, equation 2.""",
    "Gap": """
        Final loss of the baseline less that of the challenger, after the same token budget at the same batch; p-values
        are against the noise of repeated seeds, with Holm's correction over challengers and batches.""",
    "Iso-loss batch ratio": """
        The batch at which the challenger has the baseline's loss after the same tokens, over the baseline's batch;
        beyond the largest batch tried it is a lower bound, never an extrapolation.""",
    "Speedup": """
        Tokens that the baseline's loss law, at its best batch and rate for each budget, needs for the challenger's
        loss, over the challenger's tokens.""",
    "Frontier": """
        The points of one optimizer that no other of its points beats in both time and cost. Share: that part of the
        axis of log deadlines on which the challenger's frontier costs less. Cost ratio: cost of the baseline over the
        challenger's at the same deadline, the geometric mean over the axis.""",
    "Interval": """
        {level}. Variance of log T pooled over cells, t quantiles; percentile bootstraps of two or three seeds cover
        far too little and are used from ten seeds on.""",
    "Training seconds": """
        Time inside optimizer steps; evaluation, checkpoints, start-up and compilation are timed apart.""",
}

CRITICAL_BATCHES: dict[str, str] = {
    "emin_over_smin": """
        The batch B_crit of T(B) = T_min (1 + B / B_crit), the same as (S / S_min − 1)(E / E_min − 1) = 1: at B_crit
        twice the least tokens and twice the least steps are spent. McCandlish et al., arXiv 1812.06162.""",
    "free_exponent": """
        The batch B_crit of T(B) = T_min (1 + (B / B_crit)^α) with α fitted: twice the least tokens, as above, with a
        knee that may be sharper or softer.""",
    "overhead_20pct": """
        The batch at which steps are 20 % above linear scaling from a reference batch: with S = a + b / B, B* = 1.2
        B_ref + 0.2 b / a. Zhang et al., arXiv 2410.21676.""",
    "token_optimal": """
        The largest batch whose tokens to the target are the least of all batches. arXiv 2505.02222, equation 6.""",
    "token_optimal_5pct": """
        The largest batch whose tokens to the target are at most 5 % above the least: less at the mercy of noise.""",
    "piecewise_kink": """
        The batch at which log S turns from slope −1 in log B to a flatter slope, both fitted with one kink. arXiv
        2505.02222, appendix F.""",
    "branched": """
        From one checkpoint, the largest multiple of the batch whose branch loses no more than 0.01 nats over a fixed
        number of tokens; an interval between two batches tried. arXiv 2505.23971.""",
    "noise_scale": """
        The simple noise scale tr Σ / |G|² of the gradient, from its squared norms at two batch sizes, each averaged
        before dividing: at the first mark after the target, at the batch that needed the fewest tokens. It is of the
        plain gradient, not of what an optimizer makes of it. arXiv 1812.06162.""",
}

PROTOCOLS: dict[str, str] = {
    "constant_ema": """
        Constant learning rate after warmup, evaluated on averaged weights: every threshold of one run counts.""",
    "constant_raw": """
        Constant learning rate after warmup, without averaging.""",
    "decayed": """
        Runs of several token budgets, each decayed to its end; a loss law through their final losses is inverted at
        the target, within the budgets tried. arXiv 2505.13738.""",
    "branched_decay": """
        One constant-rate trunk, decayed from several points: several budgets for little more than one. Read as
        decayed.""",
    "branched_batch": """
        Branches of several batch sizes from one checkpoint, over a fixed number of tokens. arXiv 2505.23971.""",
    "mid_schedule": """
        Read while the learning rate decays. Biased, as a run that decays over more tokens stands higher at the same
        tokens; kept to compare with work that reads it so.""",
    "unstated": """
        The table does not say how its losses were obtained; mixed with no other protocol.""",
}

PARTS_OF_THE_RATIO: dict[str, str] = {
    "ratio_small_batch": """
        R_0, the ratio of T_min, baseline over challenger: the token ratio at vanishing batch.""",
    "ratio_large_batch": """
        R_∞, the ratio of S_min, baseline over challenger: the token ratio at infinite batch.""",
    "critical_batch_ratio": """
        R_∞ / R_0, which is the challenger's critical batch over the baseline's, at the same loss.""",
    "critical_batch_ratio_equal_tokens": """
        The same at equal tokens: the challenger's critical batch is taken at the loss that it reaches with the
        baseline's T_min, which is a lower one where it needs fewer tokens.""",
    "exponent": """
        α of T = T_min (1 + (B / B_crit)^α), one for both optimizers: 1 where the other numbers hold as they stand.""",
    "tail_slope_baseline": """
        d log S / d log B of the baseline beyond its kink.""",
    "tail_slope_challenger": """
        d log S / d log B of the challenger beyond its kink.""",
    "tail_slope_difference": """
        Slope of the baseline less that of the challenger: not below 0, the token ratio does not vanish at large batch.
        arXiv 2505.02222, appendix F.""",
}

RATE_RULES: dict[str, str] = {
    "tuned": """
        Each batch at the best rate of its own.""",
    "square_root": """
        The best rate of one batch, times the square root of the batch over that one.""",
    "fixed": """
        The best rate of one batch at every batch.""",
}

VERDICTS: dict[str, str] = {
    "ok": """
        Nothing found that forbids to read the number as it stands; words beside it are a reservation.""",
    "refused": """
        An input that the number needs is missing; none is guessed.""",
    "diverged": """
        Runs diverged, which counts as never reaching the target.""",
    "not_reached": """
        No run reached the target: its tokens are above those seen.""",
    "reached_at_first_eval": """
        The target was reached before the first evaluation: its tokens are below those seen.""",
    "not_identified": """
        The data do not bound the number on both sides, as where the knee lies outside the batches tried.""",
    "non_monotone": """
        Tokens to the target fall before they rise with the batch; the curve is fitted to the right branch.""",
    "misfit": """
        The curve misses the points by more than the noise of the seeds; its interval is widened.""",
    "mid_schedule": """
        Read while the learning rate decays, which is biased and can invert rankings.""",
    "warmup_confounded": """
        The target was reached in fewer than five warmups of tokens: the warmup decides the number.""",
    "censored": """
        Some runs fell short of the target; their bounds enter by likelihood.""",
    "edge_of_grid": """
        The best learning rate lies at the edge of those tried: a better one may lie beyond.""",
    "shared_machine": """
        The machine did other work at the time, so that seconds are too long.""",
    "few_points": """
        A number without an interval: fewer points than parameters and three more.""",
    "single_rate": """
        The learning rate is stated, and only one was tried: nothing says that it is a good one.""",
    "rising": """
        The slope of the token ratio in the batch is above 0, and its whole interval with it.""",
    "falling": """
        The slope of the token ratio in the batch is below 0, and its whole interval with it.""",
    "unresolved": """
        The interval of the slope of the token ratio holds 0.""",
}

#: All of them under their headings, in the order of reading.
DEFINITIONS: dict[str, dict[str, str]] = {
    "Quantities": QUANTITIES,
    "Definitions of the critical batch": CRITICAL_BATCHES,
    "Protocols: how a loss is matched to tokens": PROTOCOLS,
    "Parts of the token ratio": PARTS_OF_THE_RATIO,
    "Rules of learning rate": RATE_RULES,
    "Verdicts": VERDICTS,
}
