"""R(B): the tokens that the baseline takes to a target over those of a challenger, at the same batch."""

from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.cells import Cells, complete_groups
from analysis.schemas import RATIO_TRENDS, TOKEN_RATIOS, table
from analysis.statistics.fit import MIN_SPARE_POINTS, NUM_PARAMETERS
from analysis.statistics.noise import NO_NOISE, Errors, pooled, t_quantile

_SERIES = ("model", "protocol", "target_loss_nats")
_WORST_FIRST = (
    "diverged", "not_reached", "censored", "reached_at_first_eval",
    "mid_schedule", "warmup_confounded", "edge_of_grid", "ok",
)  # fmt: skip


def token_ratios(estimated: Cells, baseline: str, level: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables `token_ratios` and `ratio_trends`: the baseline against every other optimizer.

    Runs of the same seed saw the same data from the same initial weights, so where the seeds of both sides agree the
    variance is that of their differences, pooled over batches as the noise itself is; else the variances add.

    Source: R_L(B) is arXiv 2505.02222, eq. 2.
    Assumption: differences vary alike at the chosen rates and at rates of the same rank in the two grids.
    """
    ratios, trends = [], []
    for key, cells in estimated.cells.group_by(_SERIES, maintain_order=True):
        names = dict(zip(_SERIES, key, strict=True))
        for challenger in sorted(set(cells["optimizer"]) - {baseline}):
            pair = names | {"baseline": baseline, "challenger": challenger}
            both = _side_by_side(cells, baseline, challenger)
            known = both.filter(pl.col("log_ratio").is_not_null())
            errors, num_pairs = _errors(estimated, pair, known["global_batch_tokens"].to_list())
            ratios += [pair | row for row in _ratio_rows(both, known, errors, num_pairs, level)]
            trends.append(pair | _trend(known, errors, level))
    return table(ratios, TOKEN_RATIOS), table(trends, RATIO_TRENDS)


def _side_by_side(cells: pl.DataFrame, baseline: str, challenger: str) -> pl.DataFrame:
    """Return a row per batch that both have: log_ratio (null without both T), the worse verdict, both reasons."""
    columns = ("global_batch_tokens", "tokens_to_target", "verdict", "explanation")
    sides = [cells.filter(pl.col("optimizer") == name).select(columns) for name in (baseline, challenger)]
    both = sides[0].join(sides[1], on="global_batch_tokens", suffix="_challenger").sort("global_batch_tokens")
    rank, rank_challenger = (
        pl.col(name).replace_strict(_WORST_FIRST, range(len(_WORST_FIRST)), return_dtype=pl.Int64)
        for name in ("verdict", "verdict_challenger")
    )
    own = {
        name: pl.col(name).str.replace(NO_NOISE, "", literal=True).str.strip_suffix("; ")
        for name in ("explanation", "explanation_challenger")
    }  # the ratio says by itself whether it has an interval
    reasons = (
        pl.when(own[column] != "").then(pl.lit(f"{fmt.optimizer_name(name)}: ") + own[column])
        for name, column in ((baseline, "explanation"), (challenger, "explanation_challenger"))
    )
    return both.select(
        "global_batch_tokens",
        log_ratio=(pl.col("tokens_to_target") / pl.col("tokens_to_target_challenger")).log(),
        verdict=pl.when(rank_challenger < rank).then("verdict_challenger").otherwise("verdict"),
        explanation=pl.concat_str(reasons, separator="; ", ignore_nulls=True),
    )


def _errors(estimated: Cells, pair: dict[str, Any], batches: list[int]) -> tuple[Errors | None, list[int]]:
    """Return the errors of log R, of paired differences if all seeds agree, else added; and the pairs per batch."""
    series = {name: pair[name] for name in _SERIES}
    sides = [series | {"optimizer": pair[side]} for side in ("baseline", "challenger")]
    seeds = [_seeds(estimated.chosen.filter(**side), batches) for side in sides]
    unpaired = [0] * len(batches)
    if not batches:
        return None, unpaired
    if seeds[0] == seeds[1]:
        noise = pooled(_differences(*(estimated.runs.filter(**side) for side in sides)))
        if noise is not None:
            return noise.of_means(seeds[0]), [len(own) for own in seeds[0]]
    baseline, challenger = (estimated.noise_of(side) for side in sides)
    if baseline is None or challenger is None:
        return None, unpaired
    both = [baseline.of_means(seeds[0]), challenger.of_means(seeds[1])]
    variances = [float(np.trace(errors.covariance)) for errors in both]
    dof, contrast_dof = (
        sum(variances) ** 2 / sum(variance**2 / nu for variance, nu in zip(variances, dofs, strict=True))
        for dofs in ([errors.dof for errors in both], [errors.contrast_dof for errors in both])
    )  # Welch-Satterthwaite
    return Errors(both[0].covariance + both[1].covariance, dof, contrast_dof), unpaired


def _seeds(runs: pl.DataFrame, batches: list[int]) -> list[list[str]]:
    return [runs.filter(pl.col("global_batch_tokens") == batch)["seed"].sort().to_list() for batch in batches]


def _differences(baseline: pl.DataFrame, challenger: pl.DataFrame) -> pl.DataFrame:
    """Pair runs of the same batch, stage, seed and rank of their rate; value is the difference of their log T."""
    rank = pl.col("peak_lr").rank("dense").over("global_batch_tokens", "stage")
    keys = ["global_batch_tokens", "stage", "rank", "seed"]
    sides = [
        complete_groups(runs.with_columns(rank=rank)).select(*keys, "log_tokens") for runs in (baseline, challenger)
    ]
    return (
        sides[0]
        .join(sides[1], on=keys, suffix="_challenger")
        .select(
            group=pl.format("{} {} {}", *keys[:3]),
            cell="global_batch_tokens",
            seed="seed",
            value=pl.col("log_tokens") - pl.col("log_tokens_challenger"),
        )
    )


def _ratio_rows(
    both: pl.DataFrame, known: pl.DataFrame, errors: Errors | None, num_pairs: list[int], level: float
) -> list[dict[str, Any]]:
    index_of = {batch: index for index, batch in enumerate(known["global_batch_tokens"])}
    rows = []
    for batch, log_ratio, *judgement in both.iter_rows():
        (verdict, reason), low, high = judgement, None, None
        if log_ratio is not None and errors is not None:
            half = t_quantile(level, errors.dof) * np.sqrt(errors.covariance[index_of[batch], index_of[batch]])
            low, high = float(np.exp(log_ratio - half)), float(np.exp(log_ratio + half))
        elif log_ratio is not None:
            verdict = "few_points" if verdict == "ok" else verdict
            reason = "; ".join(filter(None, (reason, NO_NOISE)))
        rows.append(
            {
                "global_batch_tokens": batch,
                "token_ratio": None if log_ratio is None else float(np.exp(log_ratio)),
                "token_ratio_low": low,
                "token_ratio_high": high,
                "num_pairs": 0 if log_ratio is None else num_pairs[index_of[batch]],
                "tokens_saved": None,
                "tokens_saved_low": None,
                "tokens_saved_high": None,
                "verdict": verdict,
                "reasons": "" if verdict == "ok" else verdict,
                "explanation": reason,
            }
        )
    return rows


def _trend(known: pl.DataFrame, errors: Errors | None, level: float) -> dict[str, Any]:
    """Fit d log R / d log B by generalised least squares; whether it rises is decided by its interval.

    A ratio that moves against its slope, from one batch to a larger one and beyond the noise, has no one direction.
    """
    batches = known["global_batch_tokens"].to_numpy().astype(float)
    spare = len(batches) - NUM_PARAMETERS
    if spare < 1:
        return _trend_row(
            None, None, "few_points", f"a ratio at {len(batches)} batch{'' if len(batches) == 1 else 'es'}"
        )
    design = np.column_stack([np.ones_like(batches), np.log(batches)])
    weight = np.linalg.inv(errors.covariance) if errors else np.eye(len(batches))
    inverse = np.linalg.inv(design.T @ weight @ design)
    log_ratio = known["log_ratio"].to_numpy()
    solution = inverse @ design.T @ weight @ log_ratio
    slope = float(solution[1])
    if errors is not None:
        half = t_quantile(level, errors.contrast_dof) * float(np.sqrt(inverse[1, 1]))
    elif spare >= MIN_SPARE_POINTS:
        variance = float(np.sum((log_ratio - design @ solution) ** 2)) / spare
        half = t_quantile(level, spare) * float(np.sqrt(variance * inverse[1, 1]))
    else:
        return _trend_row(
            slope, None, "few_points", "no interval: too few repeated runs, and too few batches without them"
        )
    verdict = "rising" if slope - half > 0 else "falling" if slope + half < 0 else "unresolved"
    against = _move_against(slope, known, errors, level) if errors and verdict != "unresolved" else ""
    if against:
        return _trend_row(slope, half, "non_monotone", against)
    doubtful = known.filter(pl.col("verdict") != "ok")
    reason = "; ".join(
        f"batch {fmt.tokens(batch)}: {fmt.verdict(caveat)}"
        for batch, caveat in doubtful["global_batch_tokens", "verdict"].iter_rows()
    )
    return _trend_row(slope, half, verdict, reason)


def _move_against(slope: float, known: pl.DataFrame, errors: Errors, level: float) -> str:
    """Name the first significant move against the slope: one-sided t tests, Bonferroni over pairs of batches."""
    log_ratio, batches = known["log_ratio"].to_list(), known["global_batch_tokens"].to_list()
    pairs = list(combinations(range(len(batches)), 2))
    t = t_quantile(1 - (1 - level) / len(pairs), errors.contrast_dof)
    for first, second in pairs:
        move = log_ratio[second] - log_ratio[first]
        if move * slope < 0 and abs(move) > t * errors.of_difference(first, second):
            change = f"{abs(np.expm1(move)):.0%} {'up' if move > 0 else 'down'}"
            return f"the ratio goes {change} from batch {fmt.tokens(batches[first])} to {fmt.tokens(batches[second])}"
    return ""


def _trend_row(slope: float | None, half: float | None, verdict: str, reason: str) -> dict[str, Any]:
    low, high = (None, None) if slope is None or half is None else (slope - half, slope + half)
    drop = ("largest_drop", "largest_drop_low", "largest_drop_high", "drop_from_tokens", "drop_to_tokens")
    nothing = dict.fromkeys(drop)
    reasons = "" if verdict in ("rising", "falling", "unresolved") else verdict
    judged = {"verdict": verdict, "reasons": reasons, "explanation": reason}
    return {"slope": slope, "slope_low": low, "slope_high": high} | nothing | judged
