"""A loss law inverted at a target: T of every batch, its interval and costs, and what stands against it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.statistics.loss_law import Bounded, LossLaw
from analysis.statistics.noise import LACK_OF_FIT_LEVEL, Errors, t_quantile
from analysis.verdicts import Finding, verdict_columns

#: Fewer budgets than this bound no law well enough for an interval.
MIN_BUDGETS = 3

#: What stands against the final loss of a budget, in words; one that diverged is not in the law.
_OF_BUDGETS = {
    "edge_of_grid": "best learning rate outside those tried",
    "warmup_confounded": "warmup of more than a fifth",
    "diverged": "left out, since runs at the chosen rate diverged",
}


@dataclass(frozen=True)
class LawSeries:
    """The final losses of an optimizer and the law of those of its batches that can have one.

    `cells`: rows of `FINAL_LOSSES`; `runs`: those that were chosen for them; `batches` [b]: those in the law.
    """

    names: dict[str, Any]
    cells: pl.DataFrame
    runs: pl.DataFrame
    batches: tuple[int, ...]
    law: LossLaw | None


@dataclass(frozen=True)
class Inverse:
    """T of a series at one target.

    `log_tokens`: by batch, of those that have one, whose `errors` are in the same order; `outside`: why others have
    none, and `bounds` the end of their interval that the budgets give.
    """

    log_tokens: dict[int, float]
    outside: dict[int, Finding]
    bounds: dict[int, Bounded]
    errors: Errors | None

    def tokens(self, batch: int, level: float) -> Bounded:
        """Return T of a batch with its interval."""
        log_t = self.log_tokens.get(batch)
        if log_t is None:
            return self.bounds.get(batch, (None, None, None))
        if self.errors is None:
            return float(np.exp(log_t)), None, None
        place = list(self.log_tokens).index(batch)
        half = t_quantile(level, self.errors.dof) * np.sqrt(self.errors.covariance[place, place])
        value, low, high = np.exp(log_t + np.array([0.0, -half, half])).tolist()
        return value, low, high


def invert(series: LawSeries, target: float) -> Inverse:
    """Find T on the law of every batch whose losses fall and have the target within them; none is extrapolated."""
    law = series.law
    if law is None:
        return Inverse({}, {}, {}, None)
    log_tokens = law.log_tokens(target)
    found = {batch: _outside(law, place, target) for place, batch in enumerate(series.batches)}
    outside = {batch: finding for batch, finding in found.items() if finding is not None}
    inside = np.array([batch not in outside for batch in series.batches])
    usable = law.falls & np.isfinite(log_tokens) & inside
    bounds = {batch: _bound(law, series.batches.index(batch), finding) for batch, finding in outside.items()}
    places = np.flatnonzero(usable)
    errors = law.errors_at(np.where(usable, log_tokens, law.log_centre), places) if len(places) else None
    return Inverse({series.batches[place]: float(log_tokens[place]) for place in places}, outside, bounds, errors)


def _bound(law: LossLaw, place: int, outside: Finding) -> Bounded:
    """Return T of a target outside the budgets: above the largest one or below the smallest."""
    if outside.name == "not_reached":
        return None, float(np.exp(law.max_log_tokens[place])), None
    return None, None, float(np.exp(law.min_log_tokens[place]))


def _outside(law: LossLaw, place: int, target: float) -> Finding | None:
    """Say on which side of a batch's budgets the target lies; None between them."""
    smallest, largest = law.min_log_tokens[place], law.max_log_tokens[place]
    log_tokens = law.log_tokens(target)[place]
    if log_tokens > largest:
        loss = law.losses_at(law.max_log_tokens)[place]
        words = (
            f"beyond the largest budget, where the law is at {loss:.3f} ({fmt.tokens(round(np.exp(largest)))} tokens)"
        )
        return Finding("not_reached", words)
    if log_tokens < smallest:
        loss = law.losses_at(law.min_log_tokens)[place]
        words = (
            f"below the smallest budget, where the law is at {loss:.3f} ({fmt.tokens(round(np.exp(smallest)))} tokens)"
        )
        return Finding("reached_at_first_eval", words)
    return None


def cell_rows(series: LawSeries, target: float, inverse: Inverse, level: float) -> Iterator[dict[str, Any]]:
    for (batch,), cells in series.cells.group_by(["global_batch_tokens"], maintain_order=True):
        findings = findings_of_batch(series, batch)
        if batch in inverse.outside:
            findings.append(inverse.outside[batch])
        tokens = inverse.tokens(batch, level)
        if series.law and series.law.covariance is not None and tokens[0] is not None and tokens[1] is None:
            findings.append(Finding("few_points", "no interval: the law leaves the errors of T unknown"))
        yield {
            **series.names,
            "target_loss_nats": target,
            "global_batch_tokens": batch,
            **_setting(cells, tokens[0]),
            **_counts(series.runs.filter(global_batch_tokens=batch), target),
            **interval_columns("tokens_to_target", tokens),
            **_costs(series.runs.filter(global_batch_tokens=batch), batch, tokens[0]),
            **verdict_columns(findings),
        }


def _setting(cells: pl.DataFrame, tokens: float | None) -> dict[str, Any]:
    """Return the rate of a batch at the budget nearest to T, and where its seeds are from."""
    near = None if tokens is None else (cells["tokens"].log() - np.log(tokens)).abs().arg_min()
    best = cells.row(near, named=True) if near is not None else dict.fromkeys(("peak_lr", "tuning", "lr_verdict"))
    fresh = (cells["seeds_from"] == "fresh").all()
    return {
        "best_lr": best["peak_lr"],
        "tuning": best["tuning"] or "",
        **interval_columns("optimal_lr", (None, None, None)),
        "lr_verdict": best["lr_verdict"] or "not_identified",
        "lr_reason": "",
        "seeds_from": "fresh" if fresh else "grid",
    }


def _counts(runs: pl.DataFrame, target: float) -> dict[str, int]:
    reached = runs.filter(pl.col("loss_nats") <= target).height
    lost = runs["loss_nats"].null_count()
    return {"num_seeds": runs.height, "num_reached": reached, "num_censored": 0, "num_diverged": lost}


def _costs(runs: pl.DataFrame, batch: int, tokens: float | None) -> dict[str, float | None]:
    """Return steps, FLOPs and seconds until T: the runs of a batch spend them in proportion to their tokens."""

    def until_target(name: str) -> float | None:
        if tokens is None or runs.is_empty() or runs[name].null_count():
            return None
        return tokens * float(runs.select(pl.col(name).sum() / pl.col("own_tokens").sum()).item())

    return {
        "steps_to_target": None if tokens is None else tokens / batch,
        "flops_to_target": until_target("train_flops"),
        "train_seconds_to_target": until_target("train_seconds"),
    }


def findings_of_batch(series: LawSeries, batch: int) -> list[Finding]:
    """Say what stands against the law of a batch, at any target."""
    cells = series.cells.filter(global_batch_tokens=batch)
    known = cells.filter(pl.col("final_loss_nats").is_not_null())
    budgets = known["tokens"].unique().sort().to_list()
    if not budgets:
        return [Finding("diverged", "at every budget runs at the chosen rate diverged")]
    if len(budgets) == 1:
        one = f"one token budget, {fmt.tokens(budgets[0])}, identifies no tokens to a target: it takes several"
        return [Finding("refused", one)]
    law, findings = series.law, []
    assert law is not None
    if not law.falls[series.batches.index(batch)]:
        findings.append(Finding("not_identified", "the loss does not fall all the way to the largest budget"))
    if law.covariance is None:
        findings.append(Finding("few_points", f"no interval: {_why_no_interval(series)}"))
    elif law.lack_of_fit_p is not None and law.lack_of_fit_p < LACK_OF_FIT_LEVEL:
        missed = f"the law misses the losses by more than the seed noise (p = {law.lack_of_fit_p:.2g})"
        findings.append(Finding("misfit", f"{missed}, so the interval is widened {law.birge_factor:.1f} times"))
    for verdict, words in _OF_BUDGETS.items():
        concerned = cells.filter(pl.col("reasons").str.split(", ").list.contains(verdict))["token_budget"].to_list()
        if concerned:
            findings.append(Finding("ok" if verdict == "diverged" else verdict, f"{words}: {_named(concerned)}"))
    if (cells["lr_verdict"] == "single_rate").any():
        findings.append(Finding("single_rate", "only one learning rate was tried"))
    return findings


def _why_no_interval(series: LawSeries) -> str:
    budgets = series.cells.filter(pl.col("final_loss_nats").is_not_null()).group_by("global_batch_tokens").len()["len"]
    if max(budgets) < MIN_BUDGETS:
        return f"{max(budgets)} budgets, where a law takes {MIN_BUDGETS}"
    return "too few repeated runs to estimate the noise, or no budget to spare"


def _named(budgets: list[int]) -> str:
    return f"budget{'s' if len(budgets) > 1 else ''} {fmt.listed([fmt.tokens(budget) for budget in budgets])}"


def interval_columns(name: str, estimate: Bounded) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
