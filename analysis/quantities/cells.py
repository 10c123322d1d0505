"""One estimate a cell: T at the chosen rate, with the interval that its seeds and the pooled noise support."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.learning_rates import SERIES, RateCurves, best_rate, fit_rates, rate_verdict, summarize_rates
from analysis.schemas import CELLS, RATES, table
from analysis.statistics.noise import NO_NOISE, Noise, pooled, t_quantile

#: A target reached within fewer multiples of the warmup says more about the warmup than about the batch.
MIN_WARMUPS_TO_TARGET = 5

#: Fresh seeds ran at a rate chosen for one target; at another, a rate of the grid that is better by more is named.
MAX_EXCESS_TOKENS = 0.05

#: Runs alike in these differ in their seeds alone.
_REPLICATES = ("optimizer", "global_batch_tokens", "peak_lr", "stage")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Cells:
    """Tables `rates` and `cells`; all runs by target, those that were chosen for a T; the noise of each series.

    `runs` and `chosen` are rows of the table `targets` with `log_tokens` and `seed` (of initial weights and of data).
    """

    rates: pl.DataFrame
    cells: pl.DataFrame
    runs: pl.DataFrame
    chosen: pl.DataFrame
    noise: Mapping[Key, Noise | None]

    def noise_of(self, series: Mapping[str, Any]) -> Noise | None:
        """Return the noise of one series, given its names."""
        return self.noise[tuple(series[name] for name in SERIES)]


def estimate_cells(targets: pl.DataFrame, level: float) -> Cells:
    """Choose each cell's rate at each target and estimate T there.

    A cell with fresh seeds is estimated from those, since the seeds that chose the rate flatter it; one of which a run
    fell short of the target has no T, for the mean of the survivors is too good.
    """
    runs = targets.with_columns(
        log_tokens=pl.col("tokens_to_target").log(),
        seed=pl.format("{}.{}", "init_seed", "data_seed"),
    )
    noise = {key: _noise(runs, key) for key, _ in runs.group_by(SERIES, maintain_order=True)}
    rate_rows, cell_rows, chosen = [], [], [runs.clear()]
    for key, series in runs.group_by(SERIES, maintain_order=True):
        names = dict(zip(SERIES, key, strict=True))
        rates = summarize_rates(series.filter(pl.col("stage") == "grid"))
        fitted = fit_rates(rates, noise[key], level)
        rate_rows += [names | row for row in _rate_rows(rates, fitted)]
        for (batch,), cell in series.group_by(["global_batch_tokens"], maintain_order=True):
            own = rates.filter(pl.col("global_batch_tokens") == batch)
            row, used = _cell(cell, own, fitted, noise[key], level)
            cell_rows.append(names | row)
            chosen.append(used)
    return Cells(table(rate_rows, RATES), table(cell_rows, CELLS), runs, pl.concat(chosen), noise)


def _noise(runs: pl.DataFrame, key: Key) -> Noise | None:
    """Pool the noise within an optimizer, or over all of them where one alone has too few repeated runs."""
    names = dict(zip(SERIES, key, strict=True))
    own = pooled(repeated(runs.filter(**names)))
    names.pop("optimizer")
    return own or pooled(repeated(runs.filter(**names)))


def repeated(runs: pl.DataFrame) -> pl.DataFrame:
    """Return group, cell, seed and value = log T, as `noise.pooled` takes them."""
    return complete_groups(runs).select(
        group=pl.format("{} {} {} {}", *_REPLICATES),
        cell=pl.format("{} {}", "optimizer", "global_batch_tokens"),
        seed="seed",
        value="log_tokens",
    )


def complete_groups(runs: pl.DataFrame) -> pl.DataFrame:
    """Keep the groups, alike but for their seeds, of which every run reached the target: survivors spread too little.

    The fresh seeds are a group of their own: that the rate was chosen for its mean does not bend the spread around it.
    """
    return runs.filter(pl.col("log_tokens").is_not_null().all().over(_REPLICATES))


def _rate_rows(rates: pl.DataFrame, fitted: RateCurves | None) -> Iterator[dict[str, Any]]:
    for row in rates.iter_rows(named=True):
        log_tokens = row.pop("log_tokens")
        curve = fitted.log_tokens(row["global_batch_tokens"], row["peak_lr"]) if fitted else None
        yield row | {"tokens_to_target": _exp(log_tokens), "fitted_tokens": _exp(curve)}


def _cell(
    cell: pl.DataFrame, rates: pl.DataFrame, fitted: RateCurves | None, noise: Noise | None, level: float
) -> tuple[dict[str, Any], pl.DataFrame]:
    batch = cell["global_batch_tokens"][0]
    confirmed = cell.filter(pl.col("stage") == "confirm")["peak_lr"].unique().sort().to_list()
    best_lr = best_rate(rates, fitted, confirmed)
    stage = "confirm" if confirmed else "grid"
    used = cell.clear() if best_lr is None else cell.filter(pl.col("peak_lr") == best_lr, pl.col("stage") == stage)
    optimum = fitted.optimum(batch) if fitted else (None, None, None)
    lr_verdict = rate_verdict(optimum, cell["peak_lr"].unique().to_list())
    verdict, reason = _verdict(cell, used, used if confirmed else cell, lr_verdict)
    known = verdict in ("ok", "mid_schedule", "warmup_confounded", "edge_of_grid")
    low, high = _interval(used, noise, level) if known else (None, None)
    lr_reason = ""
    if known:
        lr_reason = _join(_reservation(lr_verdict, optimum[0], best_lr, cell), _better_rate(best_lr, rates, fitted))
        reason = _join(reason, lr_reason, NO_NOISE if low is None else "")
    row = {
        "global_batch_tokens": batch,
        "best_lr": best_lr,
        "tuning": "",
        **dict(zip(("optimal_lr", "optimal_lr_low", "optimal_lr_high"), optimum, strict=True)),
        "lr_verdict": lr_verdict,
        "lr_reason": lr_reason,
        "seeds_from": "fresh" if confirmed else "grid",
        "num_seeds": used.height,
        "num_reached": used["log_tokens"].len() - used["log_tokens"].null_count(),
        "num_censored": used["bound_tokens"].count(),
        "tokens_to_target": _geometric_mean(used, "tokens_to_target") if known else None,
        "tokens_to_target_low": low,
        "tokens_to_target_high": high,
        **{
            name: _geometric_mean(used, name) if known else None
            for name in ("steps_to_target", "flops_to_target", "train_seconds_to_target")
        },
        "verdict": verdict,
        "reasons": "" if verdict == "ok" else verdict,
        "explanation": reason,
    }
    return row, used if known else used.clear()


def _verdict(cell: pl.DataFrame, used: pl.DataFrame, reported: pl.DataFrame, lr_verdict: str) -> tuple[str, str]:
    """Say whether the runs at the chosen rate give a T, and what stands against it.

    `used` is empty if none reached; `reported` are the fresh seeds or, without any, all runs of the cell.
    """
    early = reported.filter(pl.col("status") == "reached_at_first_eval").height
    if early:
        runs = fmt.count(early, "run")
        return "reached_at_first_eval", f"{runs} at the target at the first evaluation: it needs earlier marks"
    if unreached := why_unreached(cell):
        return unreached
    fell_short = used.filter(pl.col("status") != "reached").height
    if fell_short or used.is_empty():
        return "censored", f"{fell_short} of {fmt.count(used.height, 'run')} at the chosen rate fell short"
    warmups = min(used["tokens_to_target"] / used["warmup_tokens"])  # infinite without warmup
    caveats = {
        "mid_schedule": (
            used["protocol"][0] == "mid_schedule",
            "read while the learning rate decays: T is biased towards runs near their end",
        ),
        "warmup_confounded": (
            warmups < MIN_WARMUPS_TO_TARGET,
            f"reached after {warmups:.1f} warmups of tokens; "
            f"below {MIN_WARMUPS_TO_TARGET} the warmup decides the number",
        ),
        "edge_of_grid": (
            lr_verdict == "edge_of_grid",
            "the best learning rate lies outside those tried: T is an upper bound",
        ),
    }
    found = {name: reason for name, (holds, reason) in caveats.items() if holds}
    return next(iter(found), "ok"), _join(*found.values())


def why_unreached(runs: pl.DataFrame) -> tuple[str, str] | None:
    """Return verdict and reason of runs of which none reached the target, `targets` rows; None where one did."""
    if runs["status"].str.starts_with("reached").any():
        return None
    if (runs["status"] == "diverged").all():
        return "diverged", "the only run diverged" if runs.height == 1 else f"all {runs.height} runs diverged"
    return "not_reached", f"target not reached{lowest_seen(runs)}"


def lowest_seen(runs: pl.DataFrame) -> str:
    """Say how low the runs came, `targets` rows; nothing where no loss was finite."""
    lowest = runs["lowest_loss_nats"].min()
    return f"; the lowest loss seen was {lowest:.3f}" if isinstance(lowest, float) else ""


def _reservation(lr_verdict: str, optimum: float | None, best_lr: float | None, cell: pl.DataFrame) -> str:
    """Say what the grid leaves open about a rate that nothing proves wrong."""
    if lr_verdict == "single_rate":
        return "only one learning rate was tried"
    place, tried = best_lr if optimum is None else optimum, cell["peak_lr"].to_list()
    open_ended = lr_verdict == "not_identified" and place is not None and not min(tried) < place < max(tried)
    return "the best learning rate may lie outside those tried" if open_ended else ""


def _better_rate(best_lr: float | None, rates: pl.DataFrame, fitted: RateCurves | None) -> str:
    """Name the rate of the grid that the runs should have had at this target, if it matters."""
    grid = [(row["fitted_tokens"] or row["tokens_to_target"], row["peak_lr"]) for row in _rate_rows(rates, fitted)]
    tokens = {rate: tokens for tokens, rate in grid if tokens is not None}
    if best_lr not in tokens:
        return ""
    least, rate = min((tokens, rate) for rate, tokens in tokens.items())
    saved = 1 - least / tokens[best_lr]
    return (
        f"learning rate {rate:.3g} takes {saved:.0%} fewer tokens in the grid's fit"
        if saved > MAX_EXCESS_TOKENS
        else ""
    )


def _interval(used: pl.DataFrame, noise: Noise | None, level: float) -> tuple[float | None, float | None]:
    if noise is None:
        return None, None
    half = t_quantile(level, noise.dof) * np.sqrt(noise.variance / used.height)
    mean = float(np.mean(used["log_tokens"].to_numpy()))
    return _exp(mean - half), _exp(mean + half)


def _geometric_mean(runs: pl.DataFrame, name: str) -> float | None:
    values = runs[name].drop_nulls().to_numpy()
    return float(np.exp(np.log(values).mean())) if len(values) and np.all(values > 0) else None


def _exp(value: float | None) -> float | None:
    return None if value is None else float(np.exp(value))


def _join(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
