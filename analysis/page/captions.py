"""What is said beside each figure and table: what is read off, how it was made, which table holds the numbers.

`{level}` stands for the level of the intervals; line breaks mean nothing.
"""

from typing import NamedTuple


class Caption(NamedTuple):
    """A figure's title, its caption and the tables that hold what it draws."""

    title: str
    text: str
    tables: tuple[str, ...]


FIGURES: dict[str, Caption] = {
    "headline": Caption(
        "The answer in two panels",
        """Left: training tokens until the hardest target loss that the optimizers reached, against global batch
        size. Flat is perfect scaling: twice the batch, half the steps. The star marks the critical batch, where
        twice the least tokens are spent; a hollow marker carries a caveat. Right: time against compute to the same
        target. The open points are projected over device counts by the cost model below, not measured; they carry no
        interval. At the ends of a line stands batch × devices, where there is room. Lower and further left is
        better.""",
        ("cells", "fit_curves", "critical_batches", "frontier"),
    ),
    "tokens_to_target": Caption(
        "Tokens to target",
        """Each point is the geometric mean over the runs at the learning rate chosen for its batch, with its
        {level} interval; seed noise is pooled over batches. Curve and band: T(B) = T_min (1 + B / B_crit), least
        squares on log T. The star is B_crit at 2 T_min, the bar across it its {level} interval. An arrow at the top:
        not every run reached the target; at the bottom: reached before the first evaluation. A hollow marker
        carries a caveat: the table's verdict and reason say which.""",
        ("cells", "fit_curves", "critical_batches"),
    ),
    "steps_to_target": Caption(
        "Steps to target",
        """The same numbers divided by the batch: S = T / B. The curve falls as 1 / B below the critical batch and
        flattens towards S_min above it, where more data in a step saves hardly any steps. A hollow marker carries a
        caveat: the table's verdict and reason say which.""",
        ("cells", "fit_curves", "critical_batches"),
    ),
    "token_ratios": Caption(
        "Token ratio",
        """Tokens of the baseline over tokens of the other optimizer, at the same batch and loss, each at the learning
        rate chosen for it; bars are {level} intervals. Above 1 the other optimizer needs fewer tokens. Points of
        different targets are set side by side. The slope is d log ratio / d log batch with its interval. A hollow
        marker carries a caveat: the table's verdict and reason say which.""",
        ("token_ratios", "ratio_trends"),
    ),
    "frontier_device_seconds": Caption(
        "Frontier of time and device-seconds",
        """Filled points are the runs' own seconds on the machine that ran them. Open points are projected over
        device counts by the cost model below and carry no interval. A line joins the points of one optimizer that
        no other of its points beats in both time and cost; the table names batch and devices of each.""",
        ("frontier", "cost_model"),
    ),
    "frontier_flops": Caption(
        "Frontier of time and FLOPs",
        """The same points with training FLOPs, the optimizer's included, as the cost: device counts change the time
        alone.""",
        ("frontier", "cost_model"),
    ),
    "loss_curves": Caption(
        "Loss against tokens",
        """Validation loss of every run at the chosen learning rate, of the grid and with fresh seeds, a line per seed,
        of the weights that the protocol reads (averaged for constant_ema). A bump at a large batch is the end of
        warmup; losses above those after the largest warmup are cut off. Thin lines are the target losses.""",
        ("evaluations", "cells"),
    ),
    "learning_rates": Caption(
        "Learning rates",
        """Upper panels: tokens to the target at each rate of the grid, the geometric mean over seeds; the line is the
        fitted quadratic in log rate, whose curvature is pooled over batches; a ring, the chosen rate. An arrow in
        the colour of its batch: at the top edge, a run fell short at this rate; at the bottom edge, runs were at the
        target at their first evaluation. Lower panels: each batch's optimum, the lowest point of its quadratic, with
        its {level} interval; open where it is not identified or at the grid's edge.""",
        ("rates", "cells"),
    ),
    "equal_budget": Caption(
        "Loss at equal tokens",
        """Validation loss after the same number of training tokens, at marks beyond the warmup of every run; mean
        over the runs at the chosen rate with its {level} interval. Intermediate marks lie on the way of longer
        runs. Of marks less than a factor of two apart the last is drawn.""",
        ("equal_budget",),
    ),
}

TABLES: dict[str, str] = {
    "critical_batches": "Critical batch sizes, one row for each definition.",
    "laws": "Power laws of the critical batch.",
    "cells": "Each optimizer and batch at its chosen learning rate.",
    "token_ratios": "Tokens of the baseline over tokens of the challenger at equal loss.",
    "ratio_trends": "How the token ratio changes with the batch.",
    "ratio_decomposition": "The token ratio taken apart: at small batch, at large batch, and their ratio.",
    "rate_rules": "The token ratio under rules of learning rate with batch.",
    "frontier": "Time and cost to each target, measured and projected.",
    "dominance": "Where on the time axis the challenger's frontier costs less.",
    "choices": "Fastest within a budget, cheapest within a deadline.",
    "equal_budget": "Losses after equal numbers of tokens.",
    "gaps": "Differences of final loss at equal token budgets.",
    "iso_loss": "The batch that the challenger may use at the baseline's loss and tokens.",
    "speedups": "Tokens of the baseline for the challenger's loss, over the challenger's.",
    "loss_laws": "Loss laws over token budgets.",
    "tuning": "What tuning has cost.",
    "rates": "Tokens to target at each learning rate of the grid.",
    "targets": "Each run against each target.",
    "runs": "The runs.",
    "fit_curves": "The fitted curves as drawn.",
    "evaluations": "The evaluations of all runs.",
    "cost_model": "Constants of the cost model.",
    "agreement": "Agreement with the reference, number by number.",
}

DEFINITIONS: dict[str, str] = {
    "Global batch": """
        Tokens per optimizer step, over all devices and accumulation.""",
    "Units": """
        A power of two from 1024 on is exact and written in binary units without decimals: 1K is 1024, 1M is 1024².
        Everything else has three digits in decimal units: 1.00K is 1000. Axes of tokens have decimal ticks, the
        axis of batches binary ones. Tables of runs write every integer in full.""",
    "Tokens to target, T": """
        Training tokens until the validation loss first is at or below the target, interpolated between evaluations.
        A run that stops above the target is censored, never counted as a number.""",
    "emin_over_smin": """
        The batch B_crit of T(B) = T_min (1 + B / B_crit), the same as (S / S_min − 1)(E / E_min − 1) = 1: at B_crit
        twice the least tokens and twice the least steps are spent. McCandlish et al., arXiv 1812.06162.""",
    "overhead_20pct": """
        The batch at which steps are 20 % above linear scaling from a reference batch: with S = a + b / B, B* = 1.2
        B_ref + 0.2 b / a. Zhang et al., arXiv 2410.21676.""",
    "Token ratio, R": """
        Tokens of the baseline over tokens of the challenger at the same batch, target and protocol. arXiv
        2505.02222, equation 2.""",
    "Protocol": """
        How a loss is matched to tokens. constant_ema: constant learning rate after warmup, averaged weights;
        constant_raw: the same without averaging; mid_schedule: read while the rate decays, which is biased.""",
    "Interval": """
        {level}. Variance of log T pooled over cells, t quantiles: percentile bootstraps of two or three seeds cover
        far too little.""",
    "Verdict": """
        ok, or what forbids reading the number as it stands; the reason says it in words.""",
    "Training seconds": """
        Time inside optimizer steps; evaluation, checkpoints, start-up and compilation are timed apart.""",
}
