"""The answer in words: one table and a few sentences for each target, made from frames; no claim beyond a verdict.

A ratio counts as a difference only where its verdict is `ok` and its interval excludes 1; a trend only where that holds
of every ratio in it; two critical batches only where both verdicts are `ok` and the intervals do not overlap. A reason
beside `ok` is a reservation, and is said. Frontiers carry no interval, and the sentence says so.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What one model's runs say about one target: a small table and sentences."""

    target_loss_nats: float
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sentences: list[str]


def answers(estimates: Estimates) -> list[Answer]:
    """Answer for every target of one model, the hardest first."""
    return [_answer(estimates, target) for target in sorted(estimates.cells["target_loss_nats"].unique())]


def _answer(estimates: Estimates, target: float) -> Answer:
    at_target = pl.col("target_loss_nats") == target
    baseline = estimates.records.manifest.baseline
    others = sorted(set(estimates.cells["optimizer"]) - {baseline})
    sizes = sorted(estimates.cells["global_batch_tokens"].unique())
    ends = list(dict.fromkeys((sizes[0], sizes[-1])))
    fitted = estimates.critical_batches.filter(at_target, pl.col("definition") == "emin_over_smin")
    criticals = {row["optimizer"]: row for row in fitted.iter_rows(named=True)}
    ratios = estimates.token_ratios.filter(at_target).sort("global_batch_tokens").rows(named=True)
    trends = estimates.ratio_trends.filter(at_target).rows(named=True)
    frontier = estimates.frontier.filter(at_target, pl.col("kind") == "projected", "on_frontier")

    rows = [
        (
            fmt.optimizer_name(name),
            *_critical_cells(criticals.get(name)),
            *("baseline" if name == baseline else _ratio_cell(ratios, name, size) for size in ends),
        )
        for name in (baseline, *others)
    ]
    sentences = []
    for name in others:
        sentences += _ratio_sentences(
            [row for row in ratios if row["challenger"] == name and row["token_ratio"] is not None]
        )
        sentences += [_trend_sentence(row) for row in trends if row["challenger"] == name]
        sentences.append(_critical_sentence(baseline, name, criticals))
        doubtful = estimates.cells.filter(
            at_target, pl.col("optimizer").is_in([baseline, name]), pl.col("verdict") != "ok"
        )
        sentences.append(_frontier_sentence(baseline, name, frontier, doubtful.height))
    header = (
        "Optimizer",
        "Critical batch (tokens)",
        "Verdict",
        *(f"Token ratio at {fmt.batch(size)}" for size in ends),
    )
    return Answer(target, header, rows, sentences)


def _critical_cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return fmt.MISSING, "not estimated"
    return fmt.estimate(row, "critical_batch_tokens"), fmt.judged(row)


def _ratio_cell(ratios: list[Row], name: str, size: int) -> str:
    row = next((row for row in ratios if row["challenger"] == name and row["global_batch_tokens"] == size), None)
    if row is None:
        return f"{fmt.MISSING} (not estimated)"
    return fmt.estimate(row, "token_ratio") + ("" if row["verdict"] == "ok" else f" ({fmt.judged(row)})")


def _ratio_sentences(known: list[Row]) -> list[str]:
    """Say at the smallest and the largest batch with a ratio who needs fewer tokens."""
    return [_ratio_sentence(known[place]) for place in sorted({0, len(known) - 1}) if known]


def _ratio_sentence(row: Row) -> str:
    baseline, challenger = fmt.optimizer_name(row["baseline"]), fmt.optimizer_name(row["challenger"])
    low, high = row["token_ratio_low"], row["token_ratio_high"]
    place = f"At {fmt.batch(row['global_batch_tokens'])} tokens a step"
    ratio = f"token ratio {fmt.estimate(row, 'token_ratio')}"
    if row["verdict"] != "ok":
        return f"{place} {challenger} and {baseline} are not ranked: {ratio}, {fmt.judged(row)}."
    ratio += f"; {row['reason']}" if row["reason"] else ""
    if low is not None and low > 1:
        return f"{place} {challenger} needs fewer tokens than {baseline} ({ratio})."
    if high is not None and high < 1:
        return f"{place} {challenger} needs more tokens than {baseline} ({ratio})."
    return f"{place} no difference between {challenger} and {baseline} is resolved ({ratio})."


def _trend_sentence(row: Row) -> str:
    pair = f"The token ratio of {fmt.optimizer_name(row['baseline'])} over {fmt.optimizer_name(row['challenger'])}"
    slope = f"slope {fmt.estimate(row, 'slope')} in log R against log B"
    directions = {"rising": "rises", "falling": "falls"}
    if row["verdict"] not in directions:
        return f"{pair}: no trend with the batch is decided ({fmt.judged(row)})."
    if row["reason"]:
        return f"{pair}: no trend with the batch is claimed ({slope}, resting on ratios with caveats: {row['reason']})."
    return f"{pair} {directions[row['verdict']]} with the batch ({slope})."


def _critical_sentence(baseline: str, name: str, criticals: dict[str, Row]) -> str:
    """Compare two critical batches by their intervals, both of which must be whole and without a caveat."""
    pair = f"{fmt.optimizer_name(name)}'s critical batch"
    other = f"{fmt.optimizer_name(baseline)}'s"
    if not all(optimizer in criticals and _is_sound(criticals[optimizer]) for optimizer in (baseline, name)):
        return f"{pair} is not compared with {other}: one of them has a caveat or no interval."
    own, base = criticals[name], criticals[baseline]
    if own["critical_batch_tokens_low"] > base["critical_batch_tokens_high"]:
        return f"{pair} is larger than {other}: the intervals do not overlap."
    if own["critical_batch_tokens_high"] < base["critical_batch_tokens_low"]:
        return f"{pair} is smaller than {other}: the intervals do not overlap."
    return f"No difference between {pair} and {other} is resolved: the intervals overlap."


def _is_sound(critical: Row) -> bool:
    ends = (critical["critical_batch_tokens_low"], critical["critical_batch_tokens_high"])
    return critical["verdict"] == "ok" and None not in ends


def _frontier_sentence(baseline: str, name: str, frontier: pl.DataFrame, num_doubtful: int) -> str:
    """Compare two projected frontiers; `num_doubtful` of the batches behind them have a caveat or no point."""
    points = {
        optimizer: frontier.filter(pl.col("optimizer") == optimizer).select("train_seconds", "device_seconds").rows()
        for optimizer in (baseline, name)
    }
    names = fmt.optimizer_name(name), fmt.optimizer_name(baseline)
    if not all(points.values()):
        return f"Projected frontiers: {names[0]} and {names[1]} cannot be compared, for want of points."
    claim = "every point of {1} is matched or beaten by one of {0}, in time and in device-seconds"
    if _covers(points[name], points[baseline]):
        verdict = claim.format(*names)
    elif _covers(points[baseline], points[name]):
        verdict = claim.format(*reversed(names))
    else:
        verdict = f"the curves of {names[0]} and {names[1]} cross, or reach times that the other does not"
    caveat = f" ({num_doubtful} of the batches behind them with a caveat or left out)" if num_doubtful else ""
    return f"Projected frontiers, without intervals{caveat}: {verdict}."


def _covers(points: list[tuple[float, float]], others: list[tuple[float, float]]) -> bool:
    """Say whether each of `others` has one of `points` that is at most as slow and as costly."""
    return all(
        any(time <= other_time and cost <= other_cost for time, cost in points) for other_time, other_cost in others
    )
