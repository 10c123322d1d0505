"""Time against compute to a target: measured on the devices that ran, projected over device counts by a stated model.

A step of B tokens on p devices takes a + b B / p seconds, a and b fitted to the runs of a model and optimizer; for
p > 1 a ring all-reduce of the float32 gradients adds 2 (p - 1) / p × 4 bytes × parameters / bandwidth + latency log2 p.
Assumptions: steps to the target do not depend on p; communication does not overlap with computation; every device is
one like those that ran; all devices hold equally many whole sequences. A device gets no fewer tokens a step than in the
smallest batch that was measured: below that the step cost is not known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.optimize import nnls

from analysis import format as fmt
from analysis.inputs.records import Records
from analysis.schemas import COST_MODEL, FRONTIER, table

#: One 200 Gb/s link per device, and the launch of one collective over it.
BANDWIDTH_BYTES_PER_SECOND = 25e9
LATENCY_SECONDS = 20e-6
GRADIENT_BYTES = 4
MAX_DEVICES = 1024

#: A run on a processor that had less than this share of its threads was timed beside other work.
MIN_CPU_SHARE = 0.9

_PLACE = ["model", "optimizer", "target_loss_nats", "protocol", "kind"]


@dataclass(frozen=True)
class StepCost:
    """Seconds of one optimizer step: `per_step` + `per_token` × tokens per device, and the all-reduce.

    `per_step_seconds` is None where one batch size alone was timed: its share is then in `per_token_seconds`. Nothing
    is known below `min_tokens_per_device`.
    """

    per_step_seconds: float | None
    per_token_seconds: float
    min_tokens_per_device: float
    num_params: int
    source: str

    def step_seconds(self, global_batch_tokens: int, num_devices: int) -> float:
        compute = (self.per_step_seconds or 0.0) + self.per_token_seconds * global_batch_tokens / num_devices
        if num_devices == 1:
            return compute
        bytes_sent = 2 * (num_devices - 1) / num_devices * GRADIENT_BYTES * self.num_params
        return float(compute + bytes_sent / BANDWIDTH_BYTES_PER_SECOND + LATENCY_SECONDS * np.log2(num_devices))


def frontier(records: Records, cells: pl.DataFrame, chosen: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the tables `frontier` and `cost_model`; a cell without T, or without timed steps, gives no point."""
    costs = fit_step_costs(records.runs)
    sequences = dict(records.runs.select("model", "sequence_length").unique().iter_rows())
    points = [*_measured(chosen), *_projected(cells, costs, sequences)]
    verdicts = _clock_verdicts(records)
    unknown = (
        "device",
        "model_error",
        *(f"{n}_{e}" for n in ("train_seconds", "device_seconds") for e in ("low", "high")),
    )
    marks = {"on_frontier": False, "on_flops_frontier": False} | dict.fromkeys(unknown)
    rows = [point | marks | verdicts.get((point["model"], point["optimizer"]), _SOUND) for point in points]
    frame = table(rows, FRONTIER).with_columns(
        pl.struct("train_seconds", cost).map_batches(_undominated, pl.Boolean).over(_PLACE).alias(name)
        for name, cost in (("on_frontier", "device_seconds"), ("on_flops_frontier", "train_flops"))
    )
    return frame, table(_constants(costs), COST_MODEL)


def fit_step_costs(runs: pl.DataFrame) -> dict[tuple[str, str], StepCost]:
    """Fit seconds per step to every (model, optimizer), by least squares on the relative error, constants >= 0.

    Only runs on the fewest devices that were used take part, since the model puts communication beside them.
    """
    timed = runs.filter((pl.col("train_seconds") > 0) & (pl.col("step") > 0))
    timed = timed.filter(pl.col("num_devices") == pl.col("num_devices").min().over("model", "optimizer"))
    costs = {}
    for (model, optimizer), group in timed.group_by(["model", "optimizer"], maintain_order=True):
        seconds = (group["train_seconds"] / group["step"]).to_numpy()
        tokens = (group["global_batch_tokens"] / group["num_devices"]).to_numpy()
        num_batches = len(np.unique(tokens))
        columns = [np.ones_like(tokens), tokens] if num_batches > 1 else [np.zeros_like(tokens), tokens]
        (per_step, per_token), _ = nnls(np.column_stack(columns) / seconds[:, None], np.ones_like(seconds))
        worst = float(np.max(np.abs((per_step + per_token * tokens) / seconds - 1)))
        devices = ", ".join(sorted(set(group["device"].drop_nulls())))
        limit = f"projected down to {fmt.tokens(tokens.min())} tokens a device, the fewest measured"
        if num_batches == 1:
            limit = (
                "not projected to more devices: one batch size does not tell the cost of a step from that of a token"
            )
        source = (
            f"fitted to {fmt.count(group.height, 'run')} at {fmt.count(num_batches, 'batch size')} "
            f"on {group['num_devices'][0]} × {devices}, "
            f"none more than {worst:.0%} off; {limit}"
        )
        costs[str(model), str(optimizer)] = StepCost(
            per_step_seconds=float(per_step) if num_batches > 1 else None,
            per_token_seconds=float(per_token),
            min_tokens_per_device=float(tokens.min()),
            num_params=group["num_params"][0],
            source=source,
        )
    return costs


def cpu_shares(records: Records) -> pl.DataFrame:
    """Return model, optimizer and `cpu_share` of each run: processor seconds over threads × train_seconds, at its end.

    Runs without a processor's clock are left out.
    """
    last = records.evaluations.sort("run_id", "step").group_by("run_id", maintain_order=True).last()
    runs = records.runs.select("run_id", "model", "optimizer", "threads")
    share = pl.col("train_cpu_seconds") / (pl.col("train_seconds") * pl.col("threads"))
    return (
        runs.join(last, on="run_id", maintain_order="left")
        .filter(pl.col("train_seconds") > 0)
        .select("model", "optimizer", cpu_share=share)
        .drop_nulls()
    )


_SOUND = {"verdict": "ok", "reasons": "", "explanation": ""}


def _clock_verdicts(records: Records) -> dict[tuple[str, str], dict[str, str]]:
    """Return verdict and reason of every (model, optimizer) of which a run had too small a share of its threads."""
    lowest = cpu_shares(records).group_by("model", "optimizer").agg(pl.col("cpu_share").min())
    why = "times were measured on a machine shared with other work: CPU share"
    return {
        (model, optimizer): {
            "verdict": "shared_machine",
            "reasons": "shared_machine",
            "explanation": f"{why} {share:.0%}",
        }
        for model, optimizer, share in lowest.iter_rows()
        if share < MIN_CPU_SHARE
    }


def _measured(chosen: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Return one point per cell and device count: the geometric means over its runs."""
    keys = [*_PLACE[:-1], "global_batch_tokens", "num_devices"]
    timed = chosen.filter((pl.col("train_seconds_to_target") > 0) & (pl.col("flops_to_target") > 0))
    means = timed.group_by(keys, maintain_order=True).agg(
        train_seconds=pl.col("train_seconds_to_target").log().mean().exp(),
        train_flops=pl.col("flops_to_target").log().mean().exp(),
    )
    device_seconds = pl.col("train_seconds") * pl.col("num_devices")
    yield from means.with_columns(kind=pl.lit("measured"), device_seconds=device_seconds).iter_rows(named=True)


def _projected(
    cells: pl.DataFrame, costs: dict[tuple[str, str], StepCost], sequences: dict[str, int]
) -> Iterator[dict[str, Any]]:
    for cell in cells.filter(pl.col("flops_to_target").is_not_null()).iter_rows(named=True):
        cost, batch = costs.get((cell["model"], cell["optimizer"])), cell["global_batch_tokens"]
        if cost is None:
            continue
        for num_devices in device_counts(batch // sequences[cell["model"]]):
            if batch / num_devices < cost.min_tokens_per_device:
                break
            seconds = cell["steps_to_target"] * cost.step_seconds(batch, num_devices)
            yield {name: cell[name] for name in (*_PLACE[:-1], "global_batch_tokens")} | {
                "num_devices": num_devices,
                "kind": "projected",
                "train_seconds": seconds,
                "device_seconds": seconds * num_devices,
                "train_flops": cell["flops_to_target"],
            }


def device_counts(num_sequences: int) -> list[int]:
    """Return the powers of two over which the sequences of a batch divide evenly."""
    powers = (2**k for k in range(MAX_DEVICES.bit_length()))
    return [p for p in powers if p <= MAX_DEVICES and num_sequences % p == 0]


def _undominated(points: pl.Series) -> pl.Series:
    """Mark the points that no other beats: as good in both coordinates, better in one."""
    x, y = (points.struct.field(name).to_numpy() for name in points.struct.fields)
    as_good = (x <= x[:, None]) & (y <= y[:, None])
    better = (x < x[:, None]) | (y < y[:, None])
    return pl.Series(~(as_good & better).any(axis=1))


def _constants(costs: dict[tuple[str, str], StepCost]) -> Iterator[dict[str, Any]]:
    for (model, optimizer), cost in costs.items():
        fitted = {"per_step": (cost.per_step_seconds, "s/step"), "per_token": (cost.per_token_seconds, "s/token")}
        for name, (value, unit) in fitted.items():
            yield {"name": f"{model} {optimizer} {name}", "value": value, "unit": unit, "source": cost.source}
        parameters = {"value": float(cost.num_params), "unit": "", "source": "counted"}
        yield {"name": f"{model} {optimizer} parameters"} | parameters
    if costs:
        link = "assumed: one 200 Gb/s link per device"
        yield {"name": "bandwidth", "value": BANDWIDTH_BYTES_PER_SECOND, "unit": "bytes/s", "source": link}
        latency = "assumed, for each doubling of the devices"
        yield {"name": "latency", "value": LATENCY_SECONDS, "unit": "s", "source": latency}
        size = "float32 gradients, ring all-reduce: 2 (p - 1) / p times these are sent"
        yield {"name": "gradient_size", "value": float(GRADIENT_BYTES), "unit": "bytes/parameter", "source": size}
