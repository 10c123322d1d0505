"""Critical batch sizes of runs that branch from one checkpoint at several batch sizes."""

from typing import Any

import polars as pl

from analysis.inputs.records import Records
from analysis.schemas import CRITICAL_BATCHES, table
from analysis.statistics.branching import TOLERANCE_NATS, largest_harmless_batch, last_smoothed
from analysis.verdicts import Finding, verdict_columns

PROTOCOL = "branched_batch"
_GROUP = ("model", "optimizer")


def branched_batches(records: Records) -> pl.DataFrame:
    """Return rows of `critical_batches`, definition `branched`: one for each model and optimizer with branches.

    A branch's loss is the last of its smoothed validation losses; the loss of a batch is the mean over its branches at
    one learning rate, at the rate that does best where there are several. Such rows have no target loss.
    """
    runs = records.runs.filter(protocol=PROTOCOL)
    losses = (
        records.evaluations.filter(pl.col("step") > 0)
        .join(runs.select("run_id"), on="run_id", how="semi", maintain_order="left")
        .group_by("run_id", maintain_order=True)
        .agg(pl.col("val_loss_nats").drop_nulls())
        .filter(pl.col("val_loss_nats").list.len() > 0)
        .with_columns(loss=pl.col("val_loss_nats").map_elements(last_smoothed, return_dtype=pl.Float64))
    )
    by_rate = runs.join(losses, on="run_id", maintain_order="left").group_by(
        *_GROUP, "global_batch_tokens", "peak_lr", maintain_order=True
    )
    by_batch = by_rate.agg(pl.col("loss").mean()).group_by(*_GROUP, "global_batch_tokens").agg(pl.col("loss").min())
    sets = by_batch.sort("global_batch_tokens").group_by(_GROUP, maintain_order=True)
    return table([dict(zip(_GROUP, key, strict=True)) | _row(branches) for key, branches in sets], CRITICAL_BATCHES)


def _row(branches: pl.DataFrame) -> dict[str, Any]:
    batches = branches["global_batch_tokens"].to_numpy().astype(float)
    estimate = largest_harmless_batch(batches, branches["loss"].to_numpy())
    findings = [Finding("ok", f"branches from one checkpoint, and a rise of {TOLERANCE_NATS} nats costs nothing")]
    if len(batches) < 2:
        findings.append(Finding("few_points", "one batch shows no rise"))
    elif estimate.value is None:
        findings.append(Finding("not_identified", "the loss has not risen by the largest batch tried"))
    known = {
        "protocol": PROTOCOL,
        "definition": "branched",
        "residuals": "",
        "critical_batch_tokens": estimate.value,
        "critical_batch_tokens_low": estimate.low,
        "critical_batch_tokens_high": estimate.high,
        "num_batches": len(batches),
        **verdict_columns(findings),
    }
    return {name: known.get(name) for name in CRITICAL_BATCHES if name not in _GROUP}
