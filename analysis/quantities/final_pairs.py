"""Two optimizers by their final losses: what they share, and how sure a difference between them is."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.final_losses import GROUP, FinalLosses, StandardError, error_of_mean
from analysis.quantities.run_groups import complete_groups
from analysis.statistics.noise import Noise, pooled
from analysis.verdicts import Finding, findings_of

Row = dict[str, Any]

PLACE = ("global_batch_tokens", "token_budget")
SIDES = ("baseline", "challenger")


def together(first: StandardError | None, second: StandardError | None) -> StandardError | None:
    """Return the error of the sum or difference of two independent numbers, by Welch and Satterthwaite."""
    if first is None or second is None:
        return None
    variances = first.size**2, second.size**2
    dof = sum(variances) ** 2 / (variances[0] ** 2 / first.dof + variances[1] ** 2 / second.dof)
    return StandardError(float(np.sqrt(sum(variances))), dof)


@dataclass(frozen=True)
class FinalPair:
    """Two optimizers of one model and protocol; `baseline` and `challenger` are their rows of `FINAL_LOSSES`."""

    names: Row
    baseline: pl.DataFrame
    challenger: pl.DataFrame
    finals: FinalLosses

    @property
    def both(self) -> str:
        """The names of both optimizers, in words."""
        return " and ".join(fmt.optimizer_name(self.names[side]) for side in SIDES)

    def series(self, side: str) -> Row:
        """Return the names of the series of baseline or challenger."""
        return {"model": self.names["model"], "optimizer": self.names[side], "protocol": self.names["protocol"]}

    def noise(self, side: str) -> Noise | None:
        """Return the noise of the final losses of baseline or challenger."""
        return self.finals.noise[tuple(self.series(side).values())]

    def error_of_cell(self, side: str, cell: Row) -> StandardError | None:
        """Return the error of a final loss of baseline or challenger, a row of `FINAL_LOSSES`; None without noise."""
        noise = self.noise(side)
        return None if noise is None else error_of_mean(noise, cell["global_batch_tokens"], cell["num_runs"])

    def error_of_pairs(self, batch: int, budget: int) -> tuple[StandardError | None, int]:
        """Return the error of the gap of a cell, and the number of pairs, if both sides ran the same seeds there."""
        seeds = [self.seeds[side].get((batch, budget), []) for side in SIDES]
        noise = self._noise_of_differences
        if noise is None or not seeds[0] or seeds[0] != seeds[1]:
            return None, 0
        return error_of_mean(noise, batch, len(seeds[0])), len(seeds[0])

    @cached_property
    def seeds(self) -> dict[str, dict[tuple[int, int], list[str]]]:
        """The seeds of the chosen runs of both sides, by batch and budget."""
        chosen = {side: self.finals.chosen.filter(**self.series(side)) for side in SIDES}
        by_place = {side: runs.group_by(PLACE).agg(pl.col("seed").sort()) for side, runs in chosen.items()}
        return {side: {(b, budget): own for b, budget, own in rows.iter_rows()} for side, rows in by_place.items()}

    @cached_property
    def _noise_of_differences(self) -> Noise | None:
        """Pool the noise of differences over runs that pair by place, stage, seed and rank of their setting."""
        rank = pl.struct("tuning", "peak_lr").rank("dense").over(*PLACE, "stage")
        keys = [*PLACE, "stage", "rank", "seed"]
        sides = []
        for side in SIDES:
            complete = complete_groups(self.finals.runs.filter(**self.series(side)), "loss_nats", GROUP)
            sides.append(complete.with_columns(rank=rank).select(*keys, "loss_nats"))
        paired = sides[0].join(sides[1], on=keys, suffix="_challenger")
        return pooled(
            paired.select(
                group=pl.struct(keys[:-1]).rank("dense"),
                cell=pl.struct(PLACE).rank("dense"),
                seed="seed",
                value=pl.col("loss_nats") - pl.col("loss_nats_challenger"),
                log_batch=pl.col("global_batch_tokens").log(),
            )
        )


def final_pairs(finals: FinalLosses, baseline: str) -> Iterator[FinalPair]:
    """Return the baseline with every other optimizer of a model and protocol, where both have final losses."""
    for (model, protocol), cells in finals.cells.group_by(["model", "protocol"], maintain_order=True):
        sides = {name: own for (name,), own in cells.group_by(["optimizer"], maintain_order=True)}
        for challenger in sorted(sides.keys() - {baseline}) if baseline in sides else []:
            names = {"model": model, "baseline": baseline, "challenger": challenger, "protocol": protocol}
            yield FinalPair(names, sides[baseline], sides[challenger], finals)


def handed_on(optimizer: str, cells: pl.DataFrame) -> list[Finding]:
    """Return what stands against rows of `FINAL_LOSSES`, with the optimizer, and the batches where it is not all.

    That one cell has no interval is none about several.
    """
    batches: dict[Finding, list[int]] = {}
    for batch, *told in cells.select("global_batch_tokens", "reasons", "explanation").iter_rows():
        for finding in findings_of(*told):
            batches.setdefault(finding, []).append(batch)
    return [
        Finding(name, f"{fmt.optimizer_name(optimizer)}: {words}{_at(own) if len(own) < cells.height else ''}")
        for (name, words), own in batches.items()
        if name != "few_points"
    ]


def _at(batches: list[int]) -> str:
    names = [fmt.tokens(batch) for batch in sorted(set(batches))]
    return f" (batch{'es' if len(names) > 1 else ''} {fmt.listed(names)})"
