"""Critical batch sizes of runs that branch from one checkpoint at several batch sizes, over the tokens of training."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.inputs.records import Records
from analysis.quantities.run_groups import SEED_NAME
from analysis.schemas import CRITICAL_BATCHES, table
from analysis.statistics.branching import (
    TOLERANCE_NATS,
    BranchNoise,
    branch_noise,
    largest_harmless_batch,
    last_smoothed,
)
from analysis.statistics.families import Array
from analysis.statistics.intervals import Estimate
from analysis.verdicts import Finding, verdict_columns

PROTOCOL = "branched_batch"
_SERIES = ("model", "optimizer")
_POINT = (*_SERIES, "branch_tokens")
#: The run that branches start from, but for its seed.
_TRUNK = ("trunk_batch", "trunk_lr")
_RATE = ("global_batch_tokens", "peak_lr", "tuning")


@dataclass(frozen=True)
class _Branches:
    """The branches from one point of training: smoothed losses [trunks, batches], infinite where one diverged.

    `others`: trunks of which a branch is missing, and which say nothing here.
    """

    point: dict[str, Any]
    trunk_batch: int | None
    batches: Array
    losses: Array
    others: int


def branched_batches(records: Records, level: float = 0.9) -> pl.DataFrame:
    """Return rows of `critical_batches`, definition `branched`: one for each model, optimizer and branch point.

    A branch's loss is the last of its smoothed validation losses; the loss of a batch is the mean over trunks that
    differ in their seed alone: at the smallest batch of trunks, and their best rate. Where branches have several rates
    at a batch, the best counts. Such rows have no target loss. The noise of differences between branches of one trunk
    is pooled over the batches and branch points of an optimizer.
    """
    losses = _losses(records)
    rows = []
    for _, series in losses.group_by(_SERIES, maintain_order=True):
        points = [_branches(own) for _, own in series.group_by("branch_tokens", maintain_order=True)]
        noise = branch_noise([each.losses for each in points])
        rows += [_row(each, noise, level) for each in points]
    return table(rows, CRITICAL_BATCHES)


def _losses(records: Records) -> pl.DataFrame:
    """Return a row per branch that has ended: its point, its trunk's batch and rate, its own, seed and loss."""
    trunks = records.runs.select(parent_run_id="run_id", trunk_batch="global_batch_tokens", trunk_lr="peak_lr")
    ended = pl.col("status").is_in(["finished", "diverged"])
    runs = records.runs.filter(ended, protocol=PROTOCOL).join(trunks, on="parent_run_id", how="left")
    finals = (
        records.evaluations.filter(pl.col("step") > 0)
        .join(runs.select("run_id", "branch_tokens"), on="run_id", how="inner", maintain_order="left")
        .filter(pl.col("tokens_seen") > pl.col("branch_tokens").fill_null(0))
        .group_by("run_id", maintain_order=True)
        .agg(pl.col("val_loss_nats").drop_nulls())
        .filter(pl.col("val_loss_nats").list.len() > 0)
        .select("run_id", loss=pl.col("val_loss_nats").map_elements(last_smoothed, return_dtype=pl.Float64))
    )
    diverged = pl.col("status") == "diverged"
    loss = pl.when(diverged | ~pl.col("loss").is_finite()).then(float("inf")).otherwise("loss")
    return (
        runs.join(finals, on="run_id", how="left", maintain_order="left")
        .filter(diverged | pl.col("loss").is_not_null())
        .select(*_POINT, *_TRUNK, *_RATE, seed=SEED_NAME, loss=loss)
        .sort(pl.all(), nulls_last=True)
    )


def _branches(runs: pl.DataFrame) -> _Branches:
    """Choose the trunks and the rates, and keep the seeds that have a branch at every batch."""
    own = _at_best(runs.filter(pl.col("trunk_batch").eq_missing(pl.col("trunk_batch").min())))
    batches = own["global_batch_tokens"].unique().sort()
    wide = own.pivot("global_batch_tokens", index="seed", values="loss")
    complete = wide.select(map(str, batches)).drop_nulls()
    return _Branches(
        point={name: own[name][0] for name in _POINT},
        trunk_batch=own["trunk_batch"][0],
        batches=batches.to_numpy().astype(float),
        losses=complete.to_numpy(),
        others=wide.height - complete.height,
    )


def _at_best(branches: pl.DataFrame) -> pl.DataFrame:
    """Keep the trunks with the rate that does best at the smallest batch, and at each batch the best rate."""
    smallest = pl.col("global_batch_tokens") == pl.col("global_batch_tokens").min()
    means = branches.group_by(*_TRUNK, *_RATE).agg(mean=pl.col("loss").mean()).sort("mean", *_RATE)
    trunk = means.filter(smallest).head(1)
    best = means.join(trunk, on=_TRUNK, how="semi", nulls_equal=True).unique(
        "global_batch_tokens", keep="first", maintain_order=True
    )
    return branches.join(best, on=[*_TRUNK, *_RATE], how="semi", nulls_equal=True, maintain_order="left")


def _row(branches: _Branches, noise: BranchNoise | None, level: float) -> dict[str, Any]:
    num_trunks = len(branches.losses)
    known = {"protocol": PROTOCOL, "definition": "branched", "residuals": "", "num_batches": len(branches.batches)}
    row = dict.fromkeys(CRITICAL_BATCHES) | branches.point | known
    if refused := list(_refusals(branches)):
        return row | verdict_columns(refused)
    half_width = noise.half_width(num_trunks, level) if noise and num_trunks > 1 else 0.0
    estimate = largest_harmless_batch(branches.batches, branches.losses.mean(axis=0), half_width)
    interval = {
        "critical_batch_tokens": estimate.value,
        "critical_batch_tokens_low": estimate.low,
        "critical_batch_tokens_high": estimate.high,
    }
    return row | interval | verdict_columns(list(_findings(branches, estimate, half_width)))


def _refusals(branches: _Branches) -> Iterator[Finding]:
    if branches.trunk_batch not in (None, branches.batches[0]):
        yield Finding("refused", "the branch at the trunk's own batch is missing: there is nothing to compare with")
    elif not len(branches.losses):
        yield Finding("refused", f"of none of {fmt.count(branches.others, 'trunk')} have all branches ended")
    elif not np.isfinite(branches.losses[:, 0]).all():
        yield Finding("diverged", "the branch at the smallest batch diverged")


def _findings(branches: _Branches, estimate: Estimate, half_width: float) -> Iterator[Finding]:
    num_trunks = len(branches.losses)
    yield Finding("ok", f"branches from one checkpoint, and a rise of {TOLERANCE_NATS} nats costs nothing")
    if branches.trunk_batch:
        yield Finding("ok", f"the trunk is at a batch of {fmt.tokens(branches.trunk_batch)}")
    if branches.others:
        yield Finding("ok", f"{fmt.count(branches.others, 'trunk')} left out, of which a branch is missing")
    if len(branches.batches) < 2:
        yield Finding("few_points", "one batch shows no rise")
    elif estimate.value is None:
        yield Finding("not_identified", "the loss has not risen by the largest batch tried")
    elif estimate.value == branches.batches[0]:
        yield Finding("ok", "the loss rises from the smallest batch on: the critical one may be smaller")
    if not half_width:
        why = "one trunk" if num_trunks == 1 else "too few branches"
        yield Finding("ok", f"{why}: the interval is between batches tried, and knows nothing of the noise")
