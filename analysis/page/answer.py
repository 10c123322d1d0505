"""The answer in words: a lead, and one table and a few sentences for each target, made from frames.

No sentence claims beyond a verdict. A ratio counts as a difference only where its verdict is `ok` and its interval
excludes 1; a trend only where that holds of every ratio in it; two critical batches only where both verdicts are `ok`
and the intervals do not overlap; a frontier only where no batch behind it has a caveat. A reason beside `ok` is a
reservation, and is said. Frontiers carry no interval, and the sentence says so.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.quantities.cells import lowest_seen

Row = dict[str, Any]

#: What the two numbers of the lead are; `{baseline}` stands for the optimizer in the numerator.
DEFINITION = (
    "The token ratio is the tokens that {baseline} takes over those that the other optimizer takes, to the same loss "
    "at the same batch size; the critical batch is the batch size at which twice the least tokens are spent: far below "
    "it a larger batch costs next to no tokens, far above it it saves next to no steps."
)


@dataclass(frozen=True)
class Answer:
    """What one model's runs say about one target: a small table and sentences."""

    target_loss_nats: float
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sentences: list[str]


@dataclass(frozen=True)
class _AtTarget:
    """The rows of one target that the words are made from."""

    baseline: str
    others: list[str]
    sizes: list[int]
    criticals: dict[str, Row]
    ratios: list[Row]
    trends: list[Row]
    frontier: pl.DataFrame
    cells: pl.DataFrame

    def ratios_of(self, challenger: str) -> list[Row]:
        return [row for row in self.ratios if row["challenger"] == challenger]


def answers(estimates: Estimates) -> list[Answer]:
    """Answer for every target of one model: that of the headline, then the others, the hardest first."""
    targets, headline = sorted(estimates.cells["target_loss_nats"].unique()), headline_target(estimates)
    return [_answer(_at(estimates, target), target) for target in sorted(targets, key=lambda loss: loss != headline)]


def lead(estimates: Estimates) -> str:
    """Answer for the headline's target in one paragraph."""
    target = headline_target(estimates)
    if target is None:
        return _nothing_reached(estimates)
    found = _at(estimates, target)
    place = f"To a validation loss of {fmt.loss(target)} nats per token, "
    if not found.others:
        return f"{place}{_critical_numbers(found, [found.baseline])}"
    sentences = []
    for name in found.others:
        sentences.append(f"{_tokens_in_short(found, name)}.")
        sentences.append(_critical_numbers(found, [name, found.baseline]))
        sentences.append(_frontier_sentence(found, name))
    return place + " ".join(sentences)


def _at(estimates: Estimates, target: float) -> _AtTarget:
    at_target = pl.col("target_loss_nats") == target
    baseline = estimates.records.manifest.baseline
    fitted = estimates.critical_batches.filter(at_target, pl.col("definition") == "emin_over_smin")
    return _AtTarget(
        baseline=baseline,
        others=sorted(set(estimates.cells["optimizer"]) - {baseline}),
        sizes=sorted(estimates.cells["global_batch_tokens"].unique()),
        criticals={row["optimizer"]: row for row in fitted.iter_rows(named=True)},
        ratios=estimates.token_ratios.filter(at_target).sort("global_batch_tokens").rows(named=True),
        trends=estimates.ratio_trends.filter(at_target).rows(named=True),
        frontier=estimates.frontier.filter(at_target, pl.col("kind") == "projected", "on_frontier"),
        cells=estimates.cells.filter(at_target),
    )


def _answer(found: _AtTarget, target: float) -> Answer:
    ends = list(dict.fromkeys((found.sizes[0], found.sizes[-1])))
    rows = [
        (
            fmt.optimizer_name(name),
            *_critical_cells(found.criticals.get(name)),
            *("baseline" if name == found.baseline else _ratio_cell(found.ratios_of(name), size) for size in ends),
        )
        for name in (found.baseline, *found.others)
    ]
    sentences = []
    for name in found.others:
        known = [row for row in found.ratios_of(name) if row["token_ratio"] is not None]
        sentences += [_ratio_sentence(known[place]) for place in sorted({0, len(known) - 1}) if known]
        sentences += [_trend_sentence(row) for row in found.trends if row["challenger"] == name]
        sentences.append(_critical_sentence(found, name))
        sentences.append(_frontier_sentence(found, name))
    header = ("Optimizer", "Critical batch (tokens)", "Verdict", *(f"Token ratio at {fmt.tokens(s)}" for s in ends))
    return Answer(target, header, rows, sentences)


def _critical_cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return fmt.MISSING, "not estimated"
    return fmt.estimate(row, "critical_batch_tokens"), fmt.verdict(row["verdict"])


def _ratio_cell(ratios: list[Row], size: int) -> str:
    row = next((row for row in ratios if row["global_batch_tokens"] == size), None)
    if row is None:
        return f"{fmt.MISSING} (not estimated)"
    return fmt.estimate(row, "token_ratio") + ("" if row["verdict"] == "ok" else f" ({fmt.verdict(row['verdict'])})")


def _favours(row: Row) -> str:
    """Return the side that a ratio proves to need fewer tokens, `unresolved`, or `caveat`."""
    low, high = row["token_ratio_low"], row["token_ratio_high"]
    if row["verdict"] != "ok" or row["token_ratio"] is None:
        return "caveat"
    if low is not None and low > 1:
        return "challenger"
    return "baseline" if high is not None and high < 1 else "unresolved"


def _tokens_in_short(found: _AtTarget, name: str) -> str:
    """Say over all batches who takes how many times the tokens of the other, and where that is open."""
    rows, names = found.ratios_of(name), (fmt.optimizer_name(name), fmt.optimizer_name(found.baseline))
    said = [
        f"{_claim(side, own, *names)} {_places(own, found.sizes)}"
        for side in ("challenger", "baseline", "unresolved", "caveat")
        if (own := [row for row in rows if _favours(row) == side])
    ]
    return "; ".join(said) or f"no batch size gives a token ratio of {names[1]} over {names[0]}"


def _claim(side: str, rows: list[Row], challenger: str, baseline: str) -> str:
    if side == "unresolved":
        return f"no difference in tokens between {challenger} and {baseline} is resolved"
    if side == "caveat":
        return f"because of a caveat {challenger} and {baseline} are not ranked"
    favoured, other = (challenger, baseline) if side == "challenger" else (baseline, challenger)
    times = sorted(row["token_ratio"] if side == "challenger" else 1 / row["token_ratio"] for row in rows)
    ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (times[0], times[-1]))
    return f"{other} takes {' to '.join(ends)} times the tokens of {favoured}"


def _places(rows: list[Row], sizes: list[int]) -> str:
    """Name batches: `at batches 256 and 16K`, or `from batch 256 to 16K` where none between is missing."""
    batches = [row["global_batch_tokens"] for row in rows]
    names = [fmt.tokens(size) for size in batches]
    if len(batches) > 2 and batches == [size for size in sizes if batches[0] <= size <= batches[-1]]:
        return f"from batch {names[0]} to {names[-1]}"
    return f"at batch{'es' if len(names) > 1 else ''} {fmt.listed(names)}"


def _ratio_sentence(row: Row) -> str:
    baseline, challenger = fmt.optimizer_name(row["baseline"]), fmt.optimizer_name(row["challenger"])
    place = f"At {fmt.tokens(row['global_batch_tokens'])} tokens a step"
    ratio = f"token ratio {fmt.estimate(row, 'token_ratio')}"
    side = _favours(row)
    if side == "caveat":
        return f"{place} {challenger} and {baseline} are not ranked: {ratio}; {fmt.judged(row)}."
    ratio += f"; {row['explanation']}" if row["explanation"] else ""
    if side == "unresolved":
        return f"{place} no difference between {challenger} and {baseline} is resolved ({ratio})."
    amount = "fewer" if side == "challenger" else "more"
    return f"{place} {challenger} needs {amount} tokens than {baseline} ({ratio})."


def _trend_sentence(row: Row) -> str:
    pair = f"The token ratio of {fmt.optimizer_name(row['baseline'])} over {fmt.optimizer_name(row['challenger'])}"
    slope = f"slope {fmt.estimate(row, 'slope')} in log R against log B"
    directions = {"rising": "rises", "falling": "falls"}
    if row["verdict"] not in directions:
        known = [] if row["slope"] is None else [slope]
        return f"{pair}: no trend with the batch is decided ({'; '.join([*known, fmt.judged(row)])})."
    if row["explanation"]:
        caveats = f"resting on ratios with caveats: {row['explanation']}"
        return f"{pair}: no trend with the batch is claimed ({slope}, {caveats})."
    return f"{pair} {directions[row['verdict']]} with the batch ({slope})."


def _critical_numbers(found: _AtTarget, names: list[str]) -> str:
    """Give critical batches with their intervals, what the intervals decide, and every caveat or reservation."""
    numbers = [_critical_number(found.criticals.get(name)) for name in names]
    against = f" against {numbers[1]} for {fmt.optimizer_name(names[1])}" if len(names) > 1 else ""
    decided = f" {_critical_sentence(found, names[0])}" if len(names) > 1 and not _unsound(found, names) else ""
    caveats = [
        f" {'Reservation' if row['verdict'] == 'ok' else 'Caveat'} for {fmt.optimizer_name(name)}: {fmt.judged(row)}."
        for name in names
        if (row := found.criticals.get(name)) and (row["verdict"] != "ok" or row["explanation"])
    ]
    return f"{_owner(names[0])} critical batch is {numbers[0]}{against}.{decided}{''.join(caveats)}"


def _critical_number(row: Row | None) -> str:
    if row is None or row["critical_batch_tokens"] is None:
        return "unknown"
    return f"{fmt.estimate(row, 'critical_batch_tokens')} tokens"


def _owner(name: str) -> str:
    return f"{fmt.optimizer_name(name)}'s"


def _critical_sentence(found: _AtTarget, name: str) -> str:
    """Compare two critical batches by their intervals, both of which must be whole and without a caveat."""
    pair, other = f"{_owner(name)} critical batch", _owner(found.baseline)
    if unsound := _unsound(found, [name, found.baseline]):
        return f"{pair} is not compared with {other}. {unsound}."
    own, base = found.criticals[name], found.criticals[found.baseline]
    reserved = [
        f"{fmt.optimizer_name(row['optimizer'])}: {row['explanation']}" for row in (own, base) if row["explanation"]
    ]
    reservation = f" ({'; '.join(reserved)})" if reserved else ""
    if own["critical_batch_tokens_low"] > base["critical_batch_tokens_high"]:
        return f"{pair} is larger than {other}: the intervals do not overlap{reservation}."
    if own["critical_batch_tokens_high"] < base["critical_batch_tokens_low"]:
        return f"{pair} is smaller than {other}: the intervals do not overlap{reservation}."
    return f"No difference between {pair} and {other} is resolved: the intervals overlap{reservation}."


def _unsound(found: _AtTarget, names: list[str]) -> str:
    """Say which of the critical batches have a caveat or no whole interval; empty where none has."""
    words = {name: _why_unsound(found.criticals.get(name)) for name in names}
    return "; ".join(f"{fmt.optimizer_name(name)}: {why}" for name, why in words.items() if why)


def _why_unsound(row: Row | None) -> str:
    if row is None:
        return "not estimated"
    if row["verdict"] != "ok":
        return fmt.judged(row)
    return "no interval" if None in (row["critical_batch_tokens_low"], row["critical_batch_tokens_high"]) else ""


def _frontier_sentence(found: _AtTarget, name: str) -> str:
    """Compare two projected frontiers, unless a batch behind them or their clock is in doubt."""
    pair = [name, found.baseline]
    names = fmt.optimizer_name(name), fmt.optimizer_name(found.baseline)
    points = {
        optimizer: found.frontier.filter(pl.col("optimizer") == optimizer)
        .select("train_seconds", "device_seconds")
        .rows()
        for optimizer in pair
    }
    if not all(points.values()):
        return f"The projected frontiers of {names[0]} and {names[1]} cannot be compared, for want of points."
    doubts = _doubts(found, pair)
    if doubts:
        return f"The projected frontiers of {names[0]} and {names[1]} are not compared: {'; '.join(doubts)}."
    claim = "every point of {1} is matched or beaten by one of {0}, in time and in device-seconds"
    if _covers(points[name], points[found.baseline]):
        verdict = claim.format(*names)
    elif _covers(points[found.baseline], points[name]):
        verdict = claim.format(*reversed(names))
    else:
        verdict = f"the curves of {names[0]} and {names[1]} cross, or reach times that the other does not"
    return f"Projected frontiers, without intervals: {verdict}."


def _doubts(found: _AtTarget, pair: list[str]) -> list[str]:
    own = pl.col("optimizer").is_in(pair)
    number = found.cells.filter(own, pl.col("verdict") != "ok").height
    carry = "carries a caveat or is left out" if number == 1 else "carry a caveat or are left out"
    clocks = found.frontier.filter(own, pl.col("verdict") != "ok")["explanation"].unique().sort().to_list()
    return [*([f"{number} of the batches behind them {carry}"] if number else []), *clocks]


def _covers(points: list[tuple[float, float]], others: list[tuple[float, float]]) -> bool:
    """Say whether each of `others` has one of `points` that is at most as slow and as costly."""
    return all(
        any(time <= other_time and cost <= other_cost for time, cost in points) for other_time, other_cost in others
    )


def _nothing_reached(estimates: Estimates) -> str:
    targets = [fmt.loss(target) for target in sorted(estimates.records.manifest.targets_nats, reverse=True)]
    words = f"target{'s' if len(targets) > 1 else ''}: {fmt.listed(targets)} nats per token"
    if "reached_at_first_eval" in set(estimates.targets["status"]):
        return f"No tokens to a target can be told: runs were there at their first evaluation ({words})."
    return f"No target has been reached by every run of any batch size ({words}){lowest_seen(estimates.targets)}."
