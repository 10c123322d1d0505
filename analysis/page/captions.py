"""What is said beside each figure and table: what is read off, how it was made, which table holds the numbers.

`{level}` stands for the level of the intervals; line breaks mean nothing.
"""

from typing import NamedTuple


class Caption(NamedTuple):
    """A figure's title, its caption and the tables that hold what it draws."""

    title: str
    text: str
    tables: tuple[str, ...]


class Section(NamedTuple):
    """A part of the page: its anchor, its title, and the figures and tables in it."""

    anchor: str
    title: str
    figures: tuple[str, ...]
    tables: tuple[str, ...]


FIGURES: dict[str, Caption] = {
    "headline": Caption(
        "The answer",
        """Left: training tokens until the hardest target loss that the optimizers reached, against global batch
        size. Flat is perfect scaling: twice the batch, half the steps. The star marks the critical batch, where
        twice the least tokens are spent; a hollow marker carries a caveat. Right, where times were recorded: time
        against compute to the same target. The open points are projected over device counts by the cost model below,
        not measured. A bar along the diagonal is a point's {level} interval, as its time and its cost move together
        with its tokens. At the ends of a line stands batch × devices, where there is room. Lower and further left is
        better.""",
        ("cells", "fit_curves", "critical_batches", "frontier"),
    ),
    "standings": Caption(
        "Standings",
        """Tokens of the baseline over those of every other optimizer, to the hardest target that they reached, at each
        batch; the one that saves most at the largest batch is at the top, right of the line is better than the
        baseline. Bars are {level} intervals of each ratio by itself. Black marks differ from 1 after Holm's correction
        over all optimizers and batches of the figure, grey ones do not; a hollow marker carries a caveat.""",
        ("token_ratios",),
    ),
    "coverage": Caption(
        "Cells",
        """Each tile is an optimizer at a batch: how many of its runs came to the target, of how many over all learning
        rates and seeds, and how many seeds they had. A dash: nothing was run.""",
        ("targets", "runs"),
    ),
    "tokens_to_target": Caption(
        "Tokens to target",
        """Each point is the geometric mean over the runs at the learning rate chosen for its batch, with its
        {level} interval; seed noise is pooled over batches. Curve and band: T(B) = T_min (1 + B / B_crit), least
        squares on log T. The star is B_crit at 2 T_min, the bar across it its {level} interval. An arrow at the top:
        not every run reached the target; at the bottom: reached before the first evaluation. A hollow marker
        carries a caveat: the table's verdict and reason say which. Of more than five optimizers bands and stars are
        left out: the figure of critical batches has them.""",
        ("cells", "fit_curves", "critical_batches"),
    ),
    "steps_to_target": Caption(
        "Steps to target",
        """The same numbers divided by the batch: S = T / B. The curve falls as 1 / B below the critical batch and
        flattens towards S_min above it, where more data in a step saves hardly any steps. A hollow marker carries a
        caveat: the table's verdict and reason say which.""",
        ("cells", "fit_curves", "critical_batches"),
    ),
    "critical_batches": Caption(
        "Critical batch by definition",
        """Each line is a definition, explained below; bars are {level} intervals, an arrow at the edge one that goes on
        or has no end. Optimizers are compared within a line, never across lines. Hollow: with a caveat.""",
        ("critical_batches",),
    ),
    "branched_batches": Caption(
        "Critical batch over training",
        """From a checkpoint at each point of training, branches continue at multiples of the batch. Each mark is the
        largest batch that costs no more than 0.01 nats over a fixed number of tokens; bars are {level} intervals over
        seeds, from a batch that was tried to another. An arrow: no batch tried did harm, so that the critical one is
        larger.""",
        ("critical_batches",),
    ),
    "laws": Caption(
        "Scaling laws",
        """Critical batches with their {level} intervals against the variable of each law, on log axes; the line is the
        power law. Laws of several variables and by other definitions are in the table alone.""",
        ("laws", "critical_batches"),
    ),
    "token_ratios": Caption(
        "Token ratio",
        """Tokens of the baseline over tokens of the other optimizer, at the same batch and loss, each at the learning
        rate chosen for it; bars are {level} intervals. Above 1 the other optimizer needs fewer tokens. Points of
        different targets are set side by side. The slope is d log ratio / d log batch with its interval. A hollow
        marker carries a caveat: the table's verdict and reason say which.""",
        ("token_ratios", "ratio_trends"),
    ),
    "token_ratio_by_target": Caption(
        "Token ratio over the target loss",
        """The same ratios against the target loss, harder targets to the right, a line per batch; bars are {level}
        intervals. Points of different batches are set side by side.""",
        ("token_ratios",),
    ),
    "ratio_decomposition": Caption(
        "The token ratio taken apart",
        """With T(B) = T_min (1 + B / B_crit) fitted to both optimizers jointly, the ratio goes from R_0 at small batch
        to R_∞ at large batch, and R_∞ / R_0 is the challenger's critical batch over the baseline's. Bars are {level}
        intervals; the line is at 1.""",
        ("ratio_decomposition",),
    ),
    "rate_rules": Caption(
        "Token ratio under rules of learning rate",
        """The token ratio if both optimizers had followed a rule instead of each batch's best rate, read off the fitted
        quadratics in log rate; bars are {level} intervals.""",
        ("rate_rules",),
    ),
    "frontier_device_seconds": Caption(
        "Frontier of time and device-seconds",
        """Filled points are the runs' own seconds on the machine that ran them; kinds of device never share a panel.
        Open points are projected over device counts by the cost model below. A bar along the diagonal is a point's
        {level} interval, as its time and its cost move together with its tokens. A line joins the points of one
        optimizer that no other of its points beats in both time and cost; the table names batch and devices of
        each.""",
        ("frontier", "cost_model"),
    ),
    "frontier_flops": Caption(
        "Frontier of time and FLOPs",
        """The same points with training FLOPs, the optimizer's included, as the cost: device counts change the time
        alone.""",
        ("frontier", "cost_model"),
    ),
    "frontier_devices": Caption(
        "Devices against time",
        """The plot of arXiv 2505.02222: at each number of devices the fastest batch of each optimizer to the target,
        named where there is room. Numbers of devices that fewer match in time are left out.""",
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
    "gaps": Caption(
        "Gaps of final loss",
        """Final loss of the baseline less that of each other optimizer, after the same token budget at the same batch,
        with its {level} interval: above the line the other optimizer is better. Points of different optimizers are set
        side by side.""",
        ("gaps",),
    ),
    "noise_scales": Caption(
        "Gradient noise scale",
        """B_simple = tr Σ / |G|² of the gradient, in tokens, over training at the chosen learning rate: at a batch of
        that size noise and gradient are alike. Each point averages numerator and denominator over the steps since the
        point before and over seeds; bands are {level} intervals. The dashed line is the batch of the panel.""",
        ("noise_scales",),
    ),
    "sharpness": Caption(
        "Sharpness along the update",
        """⟨Z, HZ⟩ / |Z|² of the update Z of one step, with the Hessian H of the loss on a fixed part of the validation
        text where that step was taken, against the validation loss of the raw weights; a line for each run at the
        chosen learning rate. Dotted: what comes from within layers, without what layers do to each other. Above each
        panel the baseline's over the other optimizer's at the lowest validation loss that both came to.""",
        ("sharpness", "sharpness_ratios"),
    ),
    "update_norms": Caption(
        "Sizes of updates",
        """Upper panels: root mean square of what a step changes a weight of the hidden matrices by. Lower panels: the
        spectral norm of the largest of these changes. Weight decay is part of them. A line for each run at the chosen
        learning rate.""",
        ("diagnostics",),
    ),
    "spectra": Caption(
        "Spectra of update and momentum",
        """Singular values of the hidden matrices' updates and momenta in ascending order, over their root mean square,
        at the last mark of the runs at the chosen learning rate; mean over matrices and seeds. An orthogonal matrix
        lies on the thin line.""",
        ("diagnostics",),
    ),
}

TABLES: dict[str, str] = {
    "critical_batches": "Critical batch sizes, one row for each definition, and for each point that runs branch from.",
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
    "final_losses": "Losses at the end of token budgets, at the chosen learning rates.",
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
    "diagnostics": "What all runs measured of gradients and updates.",
    "noise_scales": "Gradient noise scales of each setting along its training.",
    "sharpness": "Sharpness along the updates of each run.",
    "sharpness_ratios": "Sharpness of the baseline over that of the challenger at the same validation loss.",
    "cost_model": "Constants of the cost model.",
    "agreement": "Agreement with the reference, number by number.",
}

#: What it takes to fill a table: said in its place where it is empty.
NEEDS: dict[str, str] = {
    "critical_batches": "tokens to a target at two batches or more",
    "laws": "critical batches of several model sizes, token counts or losses",
    "cells": "runs whose loss can be matched to tokens, and a target",
    "token_ratios": "tokens of the baseline and of another optimizer to the same target",
    "ratio_trends": "token ratios at two batches or more",
    "ratio_decomposition": "a curve through the tokens of the baseline and of another optimizer",
    "rate_rules": "quadratics in log rate of the baseline and of another optimizer, at shared batches",
    "frontier": "training seconds of runs that reached a target",
    "dominance": "frontiers of the baseline and of another optimizer",
    "choices": "a frontier",
    "cost_model": "training seconds",
    "equal_budget": "losses after the same tokens, beyond the warmup",
    "final_losses": "runs that ended at their token budget",
    "gaps": "final losses of the baseline and of another optimizer after the same token budget",
    "iso_loss": "final losses of the baseline and of another optimizer at several batches",
    "speedups": "loss laws of the baseline and of another optimizer, which take several token budgets",
    "loss_laws": "final losses after several token budgets",
    "tuning": "runs",
    "rates": "runs with a learning rate, and a target",
    "targets": "runs or a table of tokens to a target",
    "runs": "runs",
    "noise_scales": "runs that measure it: base.diagnostics.noise_scale",
    "sharpness": "runs that measure it: base.diagnostics.sharpness",
    "sharpness_ratios": "sharpness of the baseline and of another optimizer at one batch and validation loss",
}

SECTIONS: tuple[Section, ...] = (
    Section("coverage", "Coverage", ("coverage",), ("tuning",)),
    Section("rates", "Learning rates", ("loss_curves", "learning_rates"), ("cells", "rates")),
    Section("tokens", "Tokens to target", ("tokens_to_target",), ("loss_laws",)),
    Section("steps", "Steps to target", ("steps_to_target",), ()),
    Section("critical", "Critical batch sizes", ("critical_batches", "branched_batches"), ("critical_batches",)),
    Section(
        "ratio",
        "Token ratio",
        ("standings", "token_ratios", "token_ratio_by_target", "ratio_decomposition", "rate_rules"),
        ("token_ratios", "ratio_trends", "ratio_decomposition", "rate_rules"),
    ),
    Section(
        "frontier",
        "Compute and time",
        ("frontier_device_seconds", "frontier_flops", "frontier_devices"),
        ("dominance", "choices", "frontier", "cost_model"),
    ),
    Section(
        "budgets",
        "Equal token budgets",
        ("equal_budget", "gaps"),
        ("equal_budget", "final_losses", "gaps", "iso_loss", "speedups"),
    ),
    Section("laws", "Scaling laws", ("laws",), ("laws",)),
    Section(
        "diagnostics",
        "Gradients and updates",
        ("noise_scales", "sharpness", "update_norms", "spectra"),
        ("sharpness_ratios", "noise_scales", "sharpness"),
    ),
)

#: Of measurements that are off by default: the section is left out where no run has made any.
OPTIONAL_SECTION = "diagnostics"
