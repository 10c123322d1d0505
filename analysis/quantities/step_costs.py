"""Constants of the cost model: from timings of a sweep's steps, else fitted to the runs' own seconds."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.inputs.records import Records
from analysis.quantities.cost_model import ONE_TOKEN, Place, StepCost
from analysis.verdicts import Finding

#: A run on a processor that had less than this share of its threads was timed beside other work.
MIN_CPU_SHARE = 0.9

#: The device of a table that does not say on what its runs ran.
UNSTATED = "unstated"


def step_costs(records: Records, timings: pl.DataFrame | None = None) -> dict[Place, StepCost]:
    """Return the cost of a step of each model and optimizer on each device that ran it, timed or else fitted.

    `timings` has the columns of `harness.record.TIMING_COLUMNS`.
    """
    runs = with_device(records.runs)
    fitted = _fitted(runs, busy_clocks(records))
    return fitted if timings is None else fitted | _timed(runs, timings)


def with_device(runs: pl.DataFrame) -> pl.DataFrame:
    return runs.with_columns(pl.col("device").fill_null(UNSTATED))


def cpu_shares(records: Records) -> pl.DataFrame:
    """Return model, optimizer, device and `cpu_share` of each run: processor seconds over threads × train_seconds.

    Runs without a processor's clock are left out.
    """
    last = records.evaluations.sort("run_id", "step").group_by("run_id", maintain_order=True).last()
    runs = with_device(records.runs).select("run_id", *Place._fields, "threads")
    share = pl.col("train_cpu_seconds") / (pl.col("train_seconds") * pl.col("threads"))
    return (
        runs.join(last, on="run_id", maintain_order="left")
        .filter(pl.col("train_seconds") > 0)
        .select(*Place._fields, cpu_share=share)
        .drop_nulls()
    )


def busy_clock(share: float) -> Finding:
    """Say that a clock ran beside other work on its threads."""
    return Finding("shared_machine", f"times were measured on a machine shared with other work: CPU share {share:.0%}")


def busy_clocks(records: Records) -> dict[Place, tuple[Finding, ...]]:
    """Return a finding for every place of which a run had too small a share of its threads."""
    lowest = cpu_shares(records).group_by(*Place._fields).agg(pl.col("cpu_share").min())
    return {Place(*place): (busy_clock(share),) for *place, share in lowest.iter_rows() if share < MIN_CPU_SHARE}


def _fitted(runs: pl.DataFrame, findings: Mapping[Place, tuple[Finding, ...]]) -> dict[Place, StepCost]:
    """Fit the runs' own seconds per step; on each device, the runs on the fewest of it, which communicate least."""
    own_tokens = pl.col("tokens_seen") - pl.col("branch_tokens").fill_null(0)
    steps = own_tokens / pl.col("global_batch_tokens")
    timed = runs.filter(pl.col("train_seconds") > 0, own_tokens > 0, _own_steps_are_alike()).with_columns(
        step_seconds=pl.col("train_seconds") / steps, num_devices=pl.col("num_devices").fill_null(1)
    )
    timed = timed.filter(pl.col("num_devices") == pl.col("num_devices").min().over(*Place._fields))
    groups = timed.group_by(*Place._fields, maintain_order=True)
    places = ((Place(*map(str, key)), group) for key, group in groups)
    return {place: _fit(group, findings.get(place, ())) for place, group in places}


def _own_steps_are_alike() -> pl.Expr:
    """Tell the runs whose own steps are all of one batch: a branch changes it where it starts, if at all."""
    batch = pl.col("global_batch_tokens")
    one_batch = (pl.col("step") * batch - pl.col("tokens_seen")).abs() < batch
    return one_batch.fill_null(value=True) | pl.col("branch_tokens").is_not_null()


def _fit(runs: pl.DataFrame, findings: tuple[Finding, ...]) -> StepCost:
    """Fit seconds = per step + per token × tokens of a device, none below 0, by least squares of the relative error."""
    from scipy.optimize import nnls  # takes a tenth of a second to import

    seconds = runs["step_seconds"].to_numpy()
    tokens = (runs["global_batch_tokens"] / runs["num_devices"]).to_numpy()
    num_batches = len(np.unique(tokens))
    columns = [np.ones_like(tokens), tokens] if num_batches > 1 else [np.zeros_like(tokens), tokens]
    (per_step, per_token), _ = nnls(np.column_stack(columns) / seconds[:, None], np.ones_like(seconds))
    worst = float(np.max(np.abs((per_step + per_token * tokens) / seconds - 1)))
    limit = f"projected down to {fmt.tokens(tokens.min())} tokens a device, the fewest measured"
    if num_batches == 1:
        limit = "not projected to more devices: one batch size does not tell the cost of a step from that of a token"
    return StepCost(
        micro_batch_seconds={ONE_TOKEN: float(per_token)},
        per_step_seconds=float(per_step) if num_batches > 1 else None,
        **_of_model(runs, min(_matrix_seconds(runs, float(per_token)), float(per_step))),
        min_tokens_per_device=float(tokens.min()),
        source=f"fitted to the seconds of {fmt.count(runs.height, 'run')}, no micro-batch was timed alone: "
        f"{fmt.count(num_batches, 'batch size')} on {runs['num_devices'][0]} × {runs['device'][0]}, "
        f"none more than {worst:.0%} off; {limit}",
        findings=findings,
    )


def _matrix_seconds(runs: pl.DataFrame, per_token_seconds: float) -> float:
    """Return the seconds of the optimizer's matrix products, if they run at the rate of forward and backward."""
    flops = runs.select("optimizer_flops_per_step", "flops_per_token").drop_nulls().head(1)
    return float((flops["optimizer_flops_per_step"] / flops["flops_per_token"]).sum()) * per_token_seconds


def _of_model(runs: pl.DataFrame, matrix_seconds: float) -> dict[str, Any]:
    """Return what StepCost says of the model. The matrices are taken for all of it but embedding and head."""
    return {
        "matrix_seconds": matrix_seconds,
        "sequence_length": runs["sequence_length"][0] or ONE_TOKEN,
        "num_params": runs["num_params"][0],
        "num_matrix_params": runs["num_params_nonembedding"][0],
    }


def _timed(runs: pl.DataFrame, timings: pl.DataFrame) -> dict[Place, StepCost]:
    """Return the cost at every place that has timings: its own, or those of the optimizer of which it is a variant.

    A micro-batch takes the least time over the optimizers of its model: forward and backward know nothing of the
    optimizer, and whatever disturbs a timing only adds to it.
    """
    variants = runs.select("run_id", variant_model="model", variant_optimizer="optimizer")
    model = pl.coalesce("variant_model", "model")
    least = pl.col("micro_batch_seconds").min().over(model, "device", "threads", "precision", "micro_batch_tokens")
    named = timings.join(variants, on="run_id", how="left").with_columns(least)
    costs = {}
    for key, group in runs.group_by(*Place._fields, maintain_order=True):
        place = Place(*map(str, key))
        on_device = named.filter(pl.col("device") == place.device)
        own = on_device.filter(variant_model=place.model, variant_optimizer=place.optimizer)
        alike = on_device.filter(model=_plain(place.model), optimizer=_plain(place.optimizer))
        rows = own if own.height else alike
        if rows.height:
            costs[place] = _of_timings(group, rows)
    return costs


def _of_timings(runs: pl.DataFrame, rows: pl.DataFrame) -> StepCost:
    micro_batches = rows.group_by("micro_batch_tokens").agg(pl.col("micro_batch_seconds").median())
    shares = [share for share in rows["cpu_share"].drop_nulls() if share < MIN_CPU_SHARE]
    fewest = min(rows["micro_batch_tokens"])
    return StepCost(
        micro_batch_seconds=dict(micro_batches.sort("micro_batch_tokens").iter_rows()),
        per_step_seconds=_median(rows["optimizer_seconds"]),
        **_of_model(runs, _median(rows["matrix_seconds"])),
        min_tokens_per_device=float(fewest),
        source=f"timed alone, median of {min(rows['repeats'])} steps with a spread of up to {max(rows['spread']):.0%}, "
        f"on {fmt.count(rows['threads'][0], 'thread')} of {rows['device'][0]}; "
        f"projected down to {fmt.tokens(fewest)} tokens a device, the smallest micro-batch timed",
        findings=(busy_clock(min(shares)),) if shares else (),
    )


def _plain(name: str) -> str:
    """Return the name without the settings that set a variant apart."""
    return name.partition(",")[0]


def _median(values: pl.Series) -> float:
    return float(np.median(values.to_numpy()))
