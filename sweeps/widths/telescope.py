"""`critbatch telescope`: a sweep's hyperparameters through doubled widths, on runs of the sweep's own folder."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis.statistics.surfaces import Array
from analysis.statistics.telescoping import Telescope, finite_width, telescope
from harness.config import MachineConfig, RunConfig
from sweeps.added import Proposal
from sweeps.launch import pool_of, stage_runs, train_stage
from sweeps.pool import TRAIN
from sweeps.store import SweepFolder
from sweeps.tuning.rounds import run_rounds
from sweeps.widths.families import RATE, Family
from sweeps.work import work_of


@dataclass(frozen=True)
class Found:
    """A family, its levels so far, and the FLOPs of one run of each width."""

    family: Family
    telescope: Telescope
    run_flops: Mapping[int, float]

    @property
    def level_flops(self) -> list[float]:
        """FLOPs of all runs of each level."""
        seeds = len(self.family.seeds)
        return [len(each.points) * seeds * self.run_flops[each.width] for each in self.telescope.levels]

    @property
    def brute_force_flops(self) -> float:
        """FLOPs of the base grid at the final width."""
        points = math.prod(len(values) for values in self.family.grid)
        return points * len(self.family.seeds) * self.run_flops[self.family.widths[-1]]


def base_runs(families: Sequence[Family], runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the runs with which telescoping begins: the grids of the smallest widths."""
    smallest = {each.widths[0] for each in families}
    return [run for run in runs if run.model.width in smallest]


def telescoped(folder: SweepFolder, families: Sequence[Family], slots: int, train: str = TRAIN) -> list[Found]:
    """Train level by level until the last; return what came out. Raises: ValueError when a run fails."""
    axes = sorted({key for each in families for key in each.axes} - {RATE})
    with pool_of(folder, slots, train=train) as pool:
        run_rounds(
            folder,
            "telescope",
            axes,
            propose=lambda: next_runs(folder, families),
            train=lambda: train_stage(folder, "grid", pool),
        )
    return read(folder, families)


def next_runs(folder: SweepFolder, families: Sequence[Family]) -> list[Proposal]:
    """Return the runs that the levels which come next lack."""
    listed = {run.run_id for run in stage_runs(folder, "grid")}
    proposals = []
    for found in read(folder, families):
        width, wanted = found.telescope.wanted_width, found.telescope.wanted
        for point in () if wanted is None or width is None else wanted:
            runs = found.family.runs_at(width or 0, point)
            proposals += [Proposal(run, f"width {width}") for run in runs if run.run_id not in listed]
    return proposals


def read(folder: SweepFolder, families: Sequence[Family]) -> list[Found]:
    """Return the levels as the records have them."""
    losses, machine = final_losses_in(folder), folder.read_spec().machine
    return [_read(family, losses, machine) for family in families]


def final_losses_in(folder: SweepFolder) -> dict[str, float]:
    """Return the loss at the end of each run of the grid stage; infinite for one that diverged."""
    from analysis.inputs.records import RUNS_PARQUET, load
    from analysis.quantities.final_losses import final_runs

    started = any(folder.run(run.run_id).run.exists() for run in folder.read_manifest().runs)
    if not started and not (folder.path / RUNS_PARQUET).exists():
        return {}
    runs = final_runs(load(folder.path)).filter(pl.col("stage") == "grid")
    return {run_id: np.inf if loss is None else loss for run_id, loss in runs.select("run_id", "loss_nats").iter_rows()}


def _read(family: Family, losses: Mapping[str, float], machine: MachineConfig) -> Found:
    def of_points(width: int, points: Array) -> Array:
        return np.array([_mean_loss(family.runs_at(width, point), losses) for point in points])

    flops = {width: work_of(run, machine).train_flops for width, run in family.templates.items()}
    return Found(family, telescope(family.widths, family.grid, of_points), flops)


def _mean_loss(runs: Sequence[RunConfig], losses: Mapping[str, float]) -> float:
    """Return the mean over seeds; not a number while one is missing."""
    return float(np.mean([losses.get(run.run_id, np.nan) for run in runs]))


def levels_table(found: Sequence[Found]) -> pl.DataFrame:
    """Return a row per family, width and hyperparameter: points, optimum, its errors, cost."""
    rows = []
    for each in found:
        line = finite_width(each.telescope.levels, each.family.widths[-1])
        for level, flops in zip(each.telescope.levels, each.level_flops, strict=True):
            for place, key in enumerate(each.family.axes):
                deviation = None if level.surface is None else float(np.sqrt(level.surface.covariance[place, place]))
                mesh = float(level.mesh_error[place])
                rows.append(
                    {
                        "family": each.family.name,
                        "width": level.width,
                        "hyperparameter": key,
                        "points": len(level.points),
                        "optimum": float(2.0 ** level.optimum[place]),
                        "optimum_error_log2": deviation,
                        "mesh_error_log2": None if np.isnan(mesh) else mesh,
                        "finite_width_error_log2": line[place].finite_width_error(level.width) if line else None,
                        "lowest_loss_nats": float(level.losses.min()),
                        "level_flops": flops,
                    }
                )
    return pl.DataFrame(rows)


def answers_table(found: Sequence[Found]) -> pl.DataFrame:
    """Return a row per family and hyperparameter: the optimum at the final width and its limit, with intervals."""
    rows = []
    for each in found:
        final = each.family.widths[-1]
        for key, line in zip(each.family.axes, finite_width(each.telescope.levels, final), strict=False):
            row = {"family": each.family.name, "hyperparameter": key, "final_width": final}
            for name, estimate in (("optimum", line.at_final), ("limit", line.limit)):
                ends = zip(("", "_low", "_high"), (estimate.value, estimate.low, estimate.high), strict=True)
                row |= {f"{name}{end}": None if value is None else 2.0**value for end, value in ends}
            row |= {
                "alpha_log2": line.alpha.value,
                "alpha_log2_low": line.alpha.low,
                "alpha_log2_high": line.alpha.high,
            }
            rows.append(row)
    return pl.DataFrame(rows)


def in_words(found: Sequence[Found]) -> list[str]:
    """Say what each family cost, and where the optimum of its final width is."""
    return [line for each in found for line in (_cost_in_words(each), *_answers_in_words(each))]


def _cost_in_words(each: Found) -> str:
    spent, final = sum(each.level_flops), each.level_flops[-1]
    points = sum(len(level.points) for level in each.telescope.levels)
    return (
        f"{each.family.name}: {points:,} points, {spent:.3g} FLOPs, {spent / each.brute_force_flops:.1%} of the "
        f"{each.brute_force_flops:.3g} of the full grid at width {each.family.widths[-1]}; the final level took "
        f"{final / spent:.0%} of them."
    )


def _answers_in_words(each: Found) -> list[str]:
    lines = []
    for row in answers_table([each]).iter_rows(named=True):
        known = row["optimum_low"] is not None
        interval = f"90 % interval {row['optimum_low']:.3g} to {row['optimum_high']:.3g}" if known else "no interval"
        moves = (
            f", moving by α/n with α = {row['alpha_log2']:.3g} [{row['alpha_log2_low']:.3g}, "
            f"{row['alpha_log2_high']:.3g}] doublings"
            if known
            else ": one level alone has a surface"
        )
        key, width = row["hyperparameter"].removeprefix("optimizer."), row["final_width"]
        lines.append(f"{key} at width {width}: {row['optimum']:.3g}, {interval}{moves}.")
    return lines


def points_table(found: Sequence[Found]) -> pl.DataFrame:
    """Return a row per family, width and point: mean loss, null where training diverged, and the hyperparameters."""
    rows = []
    for each in found:
        for level in each.telescope.levels:
            for point, loss in zip(level.points, level.losses, strict=True):
                values = {key: float(f"{2.0**value:.4g}") for key, value in zip(each.family.axes, point, strict=True)}
                known = float(loss) if np.isfinite(loss) else None
                rows.append({"family": each.family.name, "width": level.width, "loss_nats": known} | values)
    return pl.DataFrame(rows, infer_schema_length=None)
