"""Sentences about one target, made from rows of the tables: who needs fewer tokens, where, and how sure.

No sentence claims beyond a verdict. A ratio counts as a difference only where its verdict is `ok` and its interval
excludes 1; a trend only where that holds of every ratio in it. A reason beside `ok` is a reservation, and is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates

Row = Mapping[str, Any]


@dataclass(frozen=True)
class AtTarget:
    """The rows of one target that the words are made from."""

    baseline: str
    others: list[str]
    sizes: list[int]
    criticals: Mapping[str, Row]
    ratios: Sequence[Row]
    trends: Sequence[Row]
    decomposition: Sequence[Row]
    dominance: Sequence[Row]

    def ratios_of(self, challenger: str) -> list[Row]:
        return [row for row in self.ratios if row["challenger"] == challenger]

    def part(self, challenger: str, quantity: str) -> Row | None:
        """Return a quantity of the decomposition of the challenger's token ratio."""
        own = (row for row in self.decomposition if (row["challenger"], row["quantity"]) == (challenger, quantity))
        return next(own, None)

    def names(self, challenger: str) -> tuple[str, str]:
        """Return how the challenger and the baseline are written."""
        return fmt.optimizer_name(challenger), fmt.optimizer_name(self.baseline)


def at_target(estimates: Estimates, target: float) -> AtTarget:
    """Collect the rows of a target; without a baseline among the cells, the first optimizer stands in its place."""
    here = pl.col("target_loss_nats") == target
    cells = estimates.cells.filter(here)
    names, baseline = sorted(cells["optimizer"].unique()), estimates.records.manifest.baseline
    baseline = baseline if baseline in names or not names else names[0]
    fitted = estimates.critical_batches.filter(here, pl.col("definition") == "emin_over_smin")
    in_log_last = fitted.sort(pl.col("residuals") == "log", maintain_order=True)
    dominance = estimates.dominance.filter(here, pl.col("cost") == "device_seconds")
    return AtTarget(
        baseline=baseline,
        others=[name for name in names if name != baseline],
        sizes=sorted(estimates.cells["global_batch_tokens"].unique()),
        criticals={row["optimizer"]: row for row in in_log_last.iter_rows(named=True)},
        ratios=estimates.token_ratios.filter(here, pl.col("verdict") != "refused")
        .sort("global_batch_tokens")
        .rows(named=True),
        trends=estimates.ratio_trends.filter(here).rows(named=True),
        decomposition=estimates.ratio_decomposition.filter(here).rows(named=True),
        dominance=dominance.sort(pl.col("kind") == "projected", descending=True, maintain_order=True).rows(named=True),
    )


def tokens_in_short(found: AtTarget, name: str) -> str:
    """Say over all batches who takes how many times the tokens of the other, and where that is open."""
    rows, names = found.ratios_of(name), found.names(name)
    said = [
        f"{_claim(side, own, *names)} {places([row['global_batch_tokens'] for row in own], found.sizes)}"
        for side in ("challenger", "baseline", "unresolved", "caveat")
        if (own := [row for row in rows if favours(row, "token_ratio") == side])
    ]
    return "; ".join(said) or f"no batch size gives a token ratio of {names[1]} over {names[0]}"


def favours(row: Row, quantity: str, even: float = 1.0) -> str:
    """Return the side that a number proves to be better, the challenger above `even`; `unresolved`, or `caveat`."""
    low, high = row[f"{quantity}_low"], row[f"{quantity}_high"]
    if row["verdict"] != "ok" or row[quantity] is None:
        return "caveat"
    if low is not None and low > even:
        return "challenger"
    return "baseline" if high is not None and high < even else "unresolved"


def _decided(row: Row, quantity: str, number: str) -> tuple[str, str]:
    """Return the side that a number favours, and the number in words with what stands against it or qualifies it."""
    side = favours(row, quantity)
    words = fmt.judged(row) if side == "caveat" else row["explanation"]
    return side, "; ".join(filter(None, (number, words)))


def places(batches: Sequence[int], sizes: Sequence[int]) -> str:
    """Name batches: `at batches 256 and 16K`, or `from batch 256 to 16K` where none between is missing."""
    names = [fmt.tokens(size) for size in batches]
    if len(batches) > 2 and list(batches) == [size for size in sizes if batches[0] <= size <= batches[-1]]:
        return f"from batch {names[0]} to {names[-1]}"
    return f"at batch{'es' if len(names) > 1 else ''} {fmt.listed(names)}"


def ratio(row: Row) -> str:
    """Say of one batch who needs fewer tokens."""
    baseline, challenger = fmt.optimizer_name(row["baseline"]), fmt.optimizer_name(row["challenger"])
    place = f"At {fmt.tokens(row['global_batch_tokens'])} tokens a step"
    side, number = _decided(row, "token_ratio", f"token ratio {fmt.estimate(row, 'token_ratio')}")
    if side == "caveat":
        return f"{place} {challenger} and {baseline} are not ranked: {number}."
    if side == "unresolved":
        return f"{place} no difference between {challenger} and {baseline} is resolved ({number})."
    amount = "fewer" if side == "challenger" else "more"
    return f"{place} {challenger} needs {amount} tokens than {baseline} ({number})."


def trend(row: Row) -> str:
    """Say whether the token ratio rises with the batch."""
    pair = f"The token ratio of {fmt.optimizer_name(row['baseline'])} over {fmt.optimizer_name(row['challenger'])}"
    slope = f"slope {fmt.estimate(row, 'slope')} in log R against log B"
    directions = {"rising": "rises", "falling": "falls"}
    known = [words for words in (slope if row["slope"] is not None else "", row["explanation"]) if words]
    if row["verdict"] == "unresolved":
        return f"{pair}: no trend with the batch is decided ({'; '.join(known)})."
    if row["verdict"] not in directions or row["explanation"]:
        return f"{pair}: no trend with the batch is claimed ({'; '.join(known or [fmt.judged(row)])})."
    return f"{pair} {directions[row['verdict']]} with the batch ({slope})."


def critical_numbers(found: AtTarget, names: list[str]) -> str:
    """Give critical batches with their intervals, what their ratio decides, and every caveat or reservation."""
    numbers = [_critical_number(found.criticals.get(name)) for name in names]
    against = f" against {numbers[1]} for {fmt.optimizer_name(names[1])}" if len(names) > 1 else ""
    ratio = found.part(names[0], "critical_batch_ratio")
    decided = f" {critical(found, names[0])}" if ratio and ratio["verdict"] == "ok" else ""
    caveats = [
        f" {'Reservation' if row['verdict'] == 'ok' else 'Caveat'} for {fmt.optimizer_name(name)}: {fmt.judged(row)}."
        for name in names
        if (row := found.criticals.get(name)) and (row["verdict"] != "ok" or row["explanation"])
    ]
    return f"{fmt.optimizer_name(names[0])}'s critical batch is {numbers[0]}{against}.{decided}{''.join(caveats)}"


def critical(found: AtTarget, name: str) -> str:
    """Compare two critical batches by the interval of their ratio, fitted jointly."""
    challenger, baseline = found.names(name)
    pair, row = f"{challenger}'s critical batch", found.part(name, "critical_batch_ratio")
    if row is None:
        return f"{pair} is not compared with {baseline}'s: their ratio is not estimated."
    known = "" if row["value"] is None else f"the ratio is {fmt.estimate(row, 'value')}"
    side, number = _decided(row, "value", known)
    if side == "caveat":
        return f"{pair} is not compared with {baseline}'s: {number}."
    if side == "unresolved":
        return f"No difference between {pair} and {baseline}'s is resolved: {number}."
    return f"{pair} is {'larger' if side == 'challenger' else 'smaller'} than {baseline}'s: {number}."


def decomposition(found: AtTarget, name: str) -> str:
    """Say what the token ratio is at vanishing and at infinite batch; empty where that was not estimated."""
    small, large = (found.part(name, f"ratio_{size}_batch") for size in ("small", "large"))
    if small is None or large is None or None in (small["value"], large["value"]):
        return ""
    challenger, baseline = found.names(name)
    numbers = f"{fmt.estimate(small, 'value')} at vanishing batch and {fmt.estimate(large, 'value')} at infinite batch"
    doubts = dict.fromkeys(fmt.judged(row) for row in (small, large) if row["verdict"] != "ok" or row["explanation"])
    return "; ".join([f"The fitted token ratio of {baseline} over {challenger} is {numbers}", *doubts]) + "."


def frontier(found: AtTarget, name: str) -> str:
    """Compare two frontiers, the projected ones where there are any: the measured cover few device counts."""
    rows = [row for row in found.dominance if row["challenger"] == name]
    if not rows:
        return "The frontiers of {} and {} cannot be compared, for want of points.".format(*found.names(name))
    several = len({row["device"] for row in rows}) > 1
    return " ".join(_frontier(row, *found.names(name), several) for row in rows if row["kind"] == rows[0]["kind"])


def _frontier(row: Row, challenger: str, baseline: str, name_device: bool) -> str:
    kind = f"{row['kind']} frontiers" + (f" on {row['device']}" if name_device else "")
    ratio = f"{baseline}'s device-seconds over {challenger}'s are {fmt.estimate(row, 'cost_ratio')}"
    side, number = _decided(row, "cost_ratio", ratio)
    if side == "caveat":
        return f"The {kind} of {challenger} and {baseline} are not compared: {fmt.judged(row)}."
    if side == "unresolved":
        return f"No difference between the {kind} of {challenger} and {baseline} is resolved ({number})."
    amount = "fewer" if side == "challenger" else "more"
    share = f"{challenger} costs less on {fmt.estimate(row, 'share')} of the time axis"
    return f"By the {kind} {challenger} costs {amount} device-seconds than {baseline} ({number}; {share})."


def _claim(side: str, rows: list[Row], challenger: str, baseline: str) -> str:
    if side == "unresolved":
        return f"no difference in tokens between {challenger} and {baseline} is resolved"
    if side == "caveat":
        return f"because of a caveat {challenger} and {baseline} are not ranked"
    favoured, other = (challenger, baseline) if side == "challenger" else (baseline, challenger)
    times = sorted(row["token_ratio"] if side == "challenger" else 1 / row["token_ratio"] for row in rows)
    ends = dict.fromkeys(f"{number:.2f}" for number in (times[0], times[-1]))
    return f"{other} takes {' to '.join(ends)} times the tokens of {favoured}"


def _critical_number(row: Row | None) -> str:
    if row is None or row["critical_batch_tokens"] is None:
        return "unknown"
    return f"{fmt.estimate(row, 'critical_batch_tokens')} tokens"
