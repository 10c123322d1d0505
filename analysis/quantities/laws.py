"""Scaling laws of the critical batch size: power laws over parameters, tokens and loss, and jointly.

A law goes across models, each at its own target loss or all at the same one; or within one model across losses. Points
of different models come of different runs. Those of one model at several losses come of the same runs, and their errors
go together: an interval from their residuals would be far too narrow, and such a law has none.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.schemas import LAWS, table
from analysis.statistics.intervals import Estimate
from analysis.statistics.power_law import MIN_SPARE_POINTS, PowerLaw, fit_power_law
from analysis.verdicts import GRAVEST_FIRST, Finding, names_of, verdict_columns

PARAMETERS, TOKENS, LOSS = "num_params_nonembedding", "tokens_to_target", "target_loss_nats"
#: Laws across models, by the variables of each; at one loss for all, those over the loss say nothing.
_ACROSS = ((PARAMETERS,), (TOKENS,), (LOSS,), (TOKENS, PARAMETERS))
_WITHIN = ((TOKENS,), (LOSS,))
_OF_ALL = ((TOKENS,), (TOKENS, PARAMETERS))
_GROUP = ("definition", "optimizer", "protocol")
#: These findings of a critical batch are about its interval, which a law does not use.
_OWN = ("few_points",)
#: Definitions whose value is one of the batches that were run, and so is known to a step of them.
_ON_GRID = ("token_optimal",)
#: Critical batches that differ by a smaller share are the same, but for rounding.
_ROUNDING = 1e-9

Row = dict[str, Any]


def laws(
    critical_batches: pl.DataFrame, models: pl.DataFrame, level: float, batches: Iterable[int] = ()
) -> pl.DataFrame:
    """Return the table `laws` over all critical batches that have a value.

    `models` gives num_params_nonembedding by model, a row or more for each; where it is null there is no law over it.
    `batches` are those that were run: a definition that picks one of them has no law over a single step.
    Assumption: over tokens, x is T at the critical batch that is y, and both come of one fit, so that their errors go
    together. That moves the exponent by less than half of its standard error if T differs between models by more than
    it is uncertain: by simulation intervals of 90 % cover 85 to 91 % for five models whose T spans a factor of 3 to 10.
    Sources: the law over parameters is that of arXiv 2410.21676, section 4; over tokens, 2505.13738; over the loss,
    Kaplan et al. 2020, B_crit(L) = B* / L^(1/α).
    """
    sizes = models.group_by("model").agg(pl.col(PARAMETERS).max().cast(pl.Float64))
    points = critical_batches.join(sizes, on="model", how="left", maintain_order="left")
    grid, rows = sorted(set(batches)), list[Row]()
    for key, group in points.group_by(_GROUP, maintain_order=True):
        names = {"of": "critical_batch_tokens"} | dict(zip(_GROUP, key, strict=True))
        for place, chosen, variables in _selections(group):
            rows += (names | place | row for law in variables for row in _law(chosen, law, level, grid))
    return table(rows, LAWS)


def _selections(group: pl.DataFrame) -> Iterator[tuple[Row, pl.DataFrame, Sequence[tuple[str, ...]]]]:
    """Yield the sets of points that laws go through, with model and target loss where all share them."""
    several = group.filter(pl.len().over("model") > 1)
    if several.is_empty():
        shared = group[LOSS].unique()
        yield {"model": None, LOSS: shared[0] if len(shared) == 1 else None}, group, _ACROSS
        return
    for (target,), own in group.group_by([LOSS], maintain_order=True):
        yield {"model": None, LOSS: target}, own, _ACROSS
    for (model,), own in several.group_by(["model"], maintain_order=True):
        yield {"model": model, LOSS: None}, own, _WITHIN
    if group["model"].n_unique() > 1:
        yield {"model": None, LOSS: None}, group, _OF_ALL


def _law(chosen: pl.DataFrame, by: tuple[str, ...], level: float, grid: Sequence[int]) -> Iterator[Row]:
    """Yield a row a variable; none where fewer than two points differ in all of them."""
    known = chosen.drop_nulls(["critical_batch_tokens", *by])
    if any(known[name].n_unique() < 2 for name in by):
        return
    is_independent = known["model"].n_unique() == known.height
    y, x = known["critical_batch_tokens"].to_numpy(), known.select(by).to_numpy()
    flat = _flat(known, grid)
    fitted = None if flat else fit_power_law(y, x, level, has_interval=is_independent)
    judged = flat or _judged(fitted, known.height, by, is_independent)
    findings = [*_carried(known), *_left_out(chosen), *judged]
    for place, name in enumerate(by):
        exponent = fitted.exponents[place] if fitted else Estimate(None)
        prefactor = fitted.prefactor if fitted else Estimate(None)
        yield {
            "by": ", ".join(by),
            "term": name,
            **_columns("exponent", exponent),
            **_columns("prefactor", prefactor),
            "num_points": known.height,
            **verdict_columns(findings),
        }


def _flat(known: pl.DataFrame, grid: Sequence[int]) -> list[Finding]:
    """Say that critical batches differ by no more than what they are known to, if so: they prove no exponent."""
    values = known["critical_batch_tokens"].sort().to_list()
    if values[-1] <= values[0] * (1 + _ROUNDING):
        return [Finding("not_identified", f"the critical batch is the same at all {known.height} points")]
    steps = [place for place, batch in enumerate(grid) if values[0] <= batch <= values[-1]]
    if known["definition"][0] in _ON_GRID and len(steps) == 2:
        return [Finding("not_identified", "the critical batches are two batches that were run next to each other")]
    return []


def _judged(fitted: PowerLaw | None, num: int, by: Sequence[str], is_independent: bool) -> Iterator[Finding]:
    num_parameters = len(by) + 1
    points = f"{num} critical batch{'' if num == 1 else 'es'} for {num_parameters} parameters"
    if fitted is None and num > num_parameters:
        yield Finding("not_identified", f"{fmt.listed(by)} go together too closely to be told apart")
    elif fitted is None:
        yield Finding("few_points", points)
    elif not is_independent:
        words = "no interval: critical batches at several losses come of the same runs, and their errors go together"
        yield Finding("few_points", words)
    elif num - num_parameters < MIN_SPARE_POINTS:
        yield Finding("few_points", f"no interval: {points}")


def _carried(known: pl.DataFrame) -> Iterator[Finding]:
    """Hand on what stands against the critical batches of a law."""
    marked = Counter(name for reasons in known["reasons"] for name in names_of(reasons))
    for name in (name for name in GRAVEST_FIRST if name in marked and name not in _OWN):
        words = f"{fmt.verdict(name)}: {marked[name]} of the {known.height} critical batches"
        yield Finding(name, words)


def _left_out(chosen: pl.DataFrame) -> Iterator[Finding]:
    """Name the points without a value: the law goes through the others alone."""
    missing = chosen.filter(pl.col("critical_batch_tokens").is_null())
    if missing.height:
        places = [f"{model} ({fmt.short_verdict(why)})" for model, why in missing.select("model", "verdict").rows()]
        yield Finding("ok", f"left out: {fmt.listed(list(dict.fromkeys(places)))}")


def _columns(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
