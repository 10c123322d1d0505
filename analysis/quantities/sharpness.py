"""Sharpness along the updates of every run, and the baseline's over a challenger's at the same validation loss."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl

from analysis.inputs.records import Records
from analysis.quantities.chosen_runs import chosen_runs
from analysis.schemas import SHARPNESS, SHARPNESS_RATIOS, table
from analysis.statistics.noise import MIN_DOF, NO_NOISE, t_quantile
from analysis.verdicts import Finding, verdict_columns

_QUANTITIES = {"sharpness": "sharpness", "sharpness_within_layers": "within_layers"}
_SETTING = ("model", "optimizer", "protocol", "global_batch_tokens", "peak_lr", "tuning")
Row = dict[str, Any]


def sharpness(records: Records) -> pl.DataFrame:
    """Return the table `sharpness`: a row for each run and mark. Source: arXiv 2606.04662."""
    measured = records.diagnostics.filter(pl.col("quantity").is_in([*_QUANTITIES]), pl.col("group") == "all")
    if measured.is_empty():
        return table([], SHARPNESS)
    named = measured.with_columns(pl.col("quantity").replace(_QUANTITIES))
    wide = named.pivot("quantity", index=["run_id", "step"], values="value")
    whole, within = pl.col("sharpness"), pl.col("within_layers")
    rows = (
        wide.join(records.runs.select("run_id", *_SETTING), on="run_id")
        .join(records.evaluations.select("run_id", "step", "tokens_seen", "val_loss_nats"), on=["run_id", "step"])
        .with_columns(cross_layers=whole - within, within_share=pl.when(whole > 0).then(within / whole))
    )
    columns = [name for name in SHARPNESS if name in rows.columns]
    return table((row | _verdict(row) for row in rows.select(columns).iter_rows(named=True)), SHARPNESS)


def sharpness_ratios(records: Records, measured: pl.DataFrame, cells: pl.DataFrame, level: float) -> pl.DataFrame:
    """Return the table `sharpness_ratios`: at each batch, at the target losses that all runs of both sides pass, and at
    the lowest loss that they have in common.

    Runs are those at the learning rate chosen for the cell; their sharpness is interpolated between marks, linearly in
    the loss. The noise of log sharpness is pooled over the batches of a pair, at targets and at lowest losses apart.
    """
    own = measured.join(chosen_runs(records.runs, cells), on="run_id", how="semi", maintain_order="left")
    baseline, targets = records.manifest.baseline, records.losses()
    rows: list[Row] = []
    for (model, protocol), part in own.group_by("model", "protocol", maintain_order=True):
        losses = targets.filter(pl.col("model") == model)["target_loss_nats"].to_list()
        for challenger in sorted(set(part["optimizer"]) - {baseline}):
            names = {"model": model, "baseline": baseline, "challenger": challenger, "protocol": protocol}
            pairs = [*_matched(part.filter(pl.col("optimizer").is_in([baseline, challenger])), names, losses)]
            rows += [
                row for is_lowest in (False, True) for row in _rows([p for p in pairs if p[0] == is_lowest], level)
            ]
    return table(rows, SHARPNESS_RATIOS)


def at_loss(losses: Sequence[float], values: Sequence[float], loss: float) -> float | None:
    """Return the value where the losses, in the order of training, first come down to one; None where they never do."""
    for (before, low), (after, high) in pairwise(zip(losses, values, strict=True)):
        if before >= loss >= after:
            return low if before == after else low + (high - low) * (before - loss) / (before - after)
    return None


_Matched = tuple[bool, Row, list[float], list[float]]


def _matched(part: pl.DataFrame, names: Row, targets: Sequence[float]) -> Iterator[_Matched]:
    """Yield for each batch and loss whether it is the lowest in common, the row's names, and both sides' sharpness."""
    for (batch,), at_batch in part.group_by("global_batch_tokens", maintain_order=True):
        sides = [_curves(at_batch.filter(pl.col("optimizer") == names[side])) for side in ("baseline", "challenger")]
        curves = [curve for side in sides for curve in side]
        if not all(sides) or not all(losses for losses, _ in curves):
            continue
        lowest = max(min(losses) for losses, _ in curves)
        for loss in sorted({*(target for target in targets if target > lowest), lowest}):
            found = [[at_loss(*curve, loss) for curve in side] for side in sides]
            values = [[value for value in side if value is not None and value > 0] for side in found]
            if [len(side) for side in values] == [len(side) for side in sides]:
                baseline, challenger = values
                yield (
                    loss == lowest,
                    names | {"global_batch_tokens": batch, "val_loss_nats": loss},
                    baseline,
                    challenger,
                )


def _curves(runs: pl.DataFrame) -> list[tuple[list[float], list[float]]]:
    """Return losses and sharpness of each run, in the order of training."""
    known = runs.drop_nulls(["val_loss_nats", "sharpness"]).sort("run_id", "tokens_seen")
    return [
        (own["val_loss_nats"].to_list(), own["sharpness"].to_list())
        for own in known.partition_by("run_id", maintain_order=True)
    ]


def _rows(pairs: Sequence[_Matched], level: float) -> Iterator[Row]:
    groups = [np.log(side) for _, _, *sides in pairs for side in sides]
    dof = sum(len(group) - 1 for group in groups)
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / max(dof, 1)
    for _, names, *sides in pairs:
        baseline, challenger = (np.log(side) for side in sides)
        ratio = float(baseline.mean() - challenger.mean())
        row = names | {
            "sharpness_ratio": float(np.exp(ratio)),
            "sharpness_ratio_low": None,
            "sharpness_ratio_high": None,
            "baseline_sharpness": float(np.exp(baseline.mean())),
            "challenger_sharpness": float(np.exp(challenger.mean())),
            "num_runs": len(baseline) + len(challenger),
        }
        if dof < MIN_DOF:
            yield row | verdict_columns([Finding("few_points", NO_NOISE)])
            continue
        half = t_quantile(level, dof) * (variance * (1 / len(baseline) + 1 / len(challenger))) ** 0.5
        ends = {
            f"sharpness_ratio_{end}": float(np.exp(ratio + sign * half)) for end, sign in (("low", -1), ("high", 1))
        }
        yield row | ends | verdict_columns([])


def _verdict(row: Row) -> dict[str, str]:
    if row["sharpness"] is None:
        return verdict_columns([Finding("diverged", "the curvature along the update is not finite")])
    if row["sharpness"] <= 0:
        return verdict_columns([Finding("ok", "no shares: the loss does not curve upwards along the update")])
    return verdict_columns([])
