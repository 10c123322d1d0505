"""What to run: the fastest point within a budget of device-seconds, the cheapest within a deadline."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.frontier import GROUP
from analysis.schemas import CHOICES, table
from analysis.statistics.pareto import undominated
from analysis.verdicts import Finding, findings_of, verdict_columns

#: Round limits a question is asked at, where the user gives none.
NUM_LIMITS = 4

#: question: what is limited, and what is then least.
_QUESTIONS = {"fastest": ("device_seconds", "train_seconds"), "cheapest": ("train_seconds", "device_seconds")}
#: Why there is no answer.
_NONE = {
    "fastest": "no point costs as few device-seconds: the cheapest takes {}",
    "cheapest": "no point is as fast: the fastest takes {}",
}

_PLACES = [name for name in GROUP if name != "optimizer"]


def choices(frontier: pl.DataFrame, budgets: Sequence[float] = (), deadlines: Sequence[float] = ()) -> pl.DataFrame:
    """Return the table `choices`: at the limits given, in device-seconds and in seconds, or at round ones.

    Raises: ValueError for a limit that is not above zero.
    """
    given = {"fastest": tuple(budgets), "cheapest": tuple(deadlines)}
    wrong = [limit for limits in given.values() for limit in limits if not 0 < limit < np.inf]
    if wrong:
        raise ValueError(f"a budget or a deadline of {wrong[0]:g} seconds; give one above zero")
    rows: list[dict[str, Any]] = []
    groups = frontier.drop_nulls("device_seconds").group_by(_PLACES, maintain_order=True)
    for key, points in groups:
        place = dict(zip(_PLACES, key, strict=True))
        rows += [place | row for question in _QUESTIONS for row in _answers(points, question, given[question])]
    return table(rows, CHOICES)


def round_limits(low: float, high: float) -> list[float]:
    """Return up to NUM_LIMITS numbers 1, 2 or 5 times a power of ten, none below `low`, the last not below `high`."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    series = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    first = next(place for place, limit in enumerate(series) if limit >= low)
    last = next((place for place, limit in enumerate(series) if limit >= high), len(series) - 1)
    picked = np.linspace(first, last, min(NUM_LIMITS, last - first + 1)).round().astype(int)
    return [series[place] for place in picked]


def _answers(points: pl.DataFrame, question: str, limits: Sequence[float]) -> Iterator[dict[str, Any]]:
    limited, least = _QUESTIONS[question]
    points = points.sort(least, limited, "optimizer", "global_batch_tokens", "num_devices")
    best_of_all = undominated(*(points[name].to_numpy() for name in (limited, least)))
    on_frontier = points.filter(best_of_all)[limited].to_list()
    for limit in limits or round_limits(min(on_frontier), max(on_frontier)):
        best = next(points.filter(pl.col(limited) <= limit).iter_rows(named=True), {})
        if best:
            findings = findings_of(best["reasons"], best["explanation"])
        else:
            findings = [Finding("not_identified", _NONE[question].format(fmt.seconds(min(on_frontier))))]
        chosen = {name: best.get(name) for name in CHOICES if name not in _PLACES}
        yield chosen | {"question": question, "limit": float(limit)} | verdict_columns(findings)
