"""Planted laboratories: Records of a sweep whose T_min, B_crit, best rates and seed noise are known."""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl

from analysis.inputs.records import Records, from_frames
from analysis.schemas import EVALUATIONS, TARGETS, polars_schema, table
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, PlannedRun, RunFolder, SweepManifest, Value, write_json

STEP_SECONDS, TOKEN_SECONDS = 2e-3, 3e-6
FLOPS_PER_TOKEN = 7e5


@dataclass(frozen=True)
class Planted:
    """One optimizer: T(B) = t_min (1 + (B / b_crit)^alpha) at the target 2.0 and its best rate.

    That is best_lr (B / 1024)^lr_exponent. `extra` is added to log T at some batches.
    """

    t_min: float = 100_000.0
    b_crit: float = 2_048.0
    best_lr: float = 0.02
    curvature: float = 0.3
    extra: Mapping[int, float] = field(default_factory=dict)
    alpha: float = 1.0
    lr_exponent: float = 0.5

    def log_tokens(self, batch: int) -> float:
        return float(np.log(self.t_min) + np.log1p((batch / self.b_crit) ** self.alpha)) + self.extra.get(batch, 0.0)

    def optimum(self, batch: int) -> float:
        return float(self.best_lr * (batch / 1024) ** self.lr_exponent)


@dataclass(frozen=True)
class Laboratory:
    """A sweep on the design of the quickstart.

    The loss falls as a power of tokens through every target: L = 2.0 (T / tokens)^exponent, so that T(L) = T(2.0)
    (2.0 / L)^(1 / exponent) exactly. Noise of log T is `noise` in all, `shared` of its variance belongs to the seed:
    common to all runs of a seed ("everywhere"), or to those of one batch ("batch"). The variance grows as
    B^noise_growth, around its value at the middle of the batches. `rates` are multiples of the optimum of each batch,
    or of that at batch 1024 where `one_grid`.
    """

    optimizers: Mapping[str, Planted] = field(
        default_factory=lambda: {"adamw": Planted(180_000.0, 2_000.0), "muon": Planted(120_000.0, 3_000.0)}
    )
    batches: tuple[int, ...] = (256, 1024, 4096, 16384)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    grid_seeds: tuple[int, ...] = (0, 1)
    fresh_seeds: tuple[int, ...] = (2,)
    targets: tuple[float, ...] = (2.2, 2.1, 2.0)
    noise: float = 0.1
    shared: float = 0.5
    sharing: str = "everywhere"
    exponent: float = 0.1
    warmup_tokens: int = 16_384
    budget_over_target: float = 1.5
    first_mark_tokens: int = 4_096
    draw: int = 0
    noise_growth: float = 0.0
    one_grid: bool = False

    def noise_at(self, batch: int) -> float:
        middle = np.log(self.batches).mean()
        return float(self.noise * np.exp(self.noise_growth / 2 * (np.log(batch) - middle)))


@dataclass(frozen=True)
class Run:
    """One run of a laboratory; `log_tokens` is where its curve meets the loss 2.0."""

    stage: str
    optimizer: str
    batch: int
    peak_lr: float
    seed: int
    log_tokens: float
    budget: int
    status: str = "finished"

    @property
    def run_id(self) -> str:
        return f"lab-{self.optimizer}-b{self.batch}-lr{self.peak_lr:.4g}-s{self.seed}"


def plan(lab: Laboratory) -> list[Run]:
    """Return the runs of a sweep: the grid, then fresh seeds at the rate with the lowest true mean in the grid."""
    runs = []
    for optimizer, planted in lab.optimizers.items():
        for batch in lab.batches:
            rates = [planted.optimum(1024 if lab.one_grid else batch) * factor for factor in lab.rates]
            best = min(rates, key=lambda rate: abs(np.log(rate / planted.optimum(batch))))
            budget = int(np.exp(planted.log_tokens(batch)) * lab.budget_over_target) // batch * batch
            for stage, seeds, tried in (("grid", lab.grid_seeds, rates), ("confirm", lab.fresh_seeds, [best])):
                for rate in tried:
                    penalty = planted.curvature * np.log(rate / planted.optimum(batch)) ** 2
                    for seed in seeds:
                        error = _error(lab, optimizer, batch, rate, seed)
                        log_tokens = planted.log_tokens(batch) + penalty + error
                        runs.append(Run(stage, optimizer, batch, rate, seed, log_tokens, budget))
    return runs


def records(lab: Laboratory, runs: Iterable[Run] | None = None) -> Records:
    """Turn planned runs, altered ones perhaps, into the records of a finished sweep."""
    runs = plan(lab) if runs is None else list(runs)
    manifest = SweepManifest(
        name="laboratory",
        baseline=next(iter(lab.optimizers)),
        targets_nats=lab.targets,
        runs=tuple(PlannedRun(run_id=run.run_id, stage=run.stage) for run in runs),
    )
    evaluations = [row for run in runs for row in evaluation_rows(lab, run)]
    return from_frames(
        manifest,
        pl.DataFrame([run_row(lab, run) for run in runs], schema=polars_schema(RUN_COLUMNS), orient="row"),
        pl.DataFrame(evaluations, schema=polars_schema(EVALUATIONS), orient="row"),
    )


def targets_table(lab: Laboratory) -> pl.DataFrame:
    """Return the table `targets` at the loss 2.0 without the detour over curves, for simulations of many sweeps."""
    return table([_target_row(lab, run) for run in plan(lab)], TARGETS)


def many_targets(lab: Laboratory, sweeps: int) -> pl.DataFrame:
    """Return the table `targets` at the loss 2.0 of many draws of a laboratory, as the models lab-0, lab-1, ...

    A run that needs more than its budget falls short of the target.
    """
    runs = plan(replace(lab, noise=0.0))
    one = table([_target_row(lab, run) for run in runs], TARGETS).with_columns(budget=pl.col("tokens_seen").cast(float))
    truth = one["tokens_to_target"].log().to_numpy()
    seed, batch = one["data_seed"].to_numpy(), one["global_batch_tokens"].to_numpy()
    common = np.unique(seed if lab.sharing == "everywhere" else seed * 2**32 + batch, return_inverse=True)[1]
    rng = np.random.default_rng(lab.draw)
    shared = rng.standard_normal((sweeps, common.max() + 1))[:, common]
    own = rng.standard_normal((sweeps, len(runs)))
    noise = np.array([lab.noise_at(size) for size in batch])
    drawn = truth + noise * (np.sqrt(lab.shared) * shared + np.sqrt(1 - lab.shared) * own)
    reached = pl.col("drawn") <= pl.col("budget")
    tokens = pl.when(reached).then("drawn")
    return (
        pl.concat([one.with_columns(model=pl.lit(f"lab-{number}")) for number in range(sweeps)])
        .with_columns(drawn=pl.Series(np.exp(drawn).ravel()))
        .with_columns(
            status=pl.when(reached).then(pl.lit("reached")).otherwise(pl.lit("not_reached")),
            run_id=pl.format("{}-{}", "model", "run_id"),
            bound_tokens=pl.when(~reached).then("budget"),
            steps_to_target=tokens / pl.col("global_batch_tokens"),
            flops_to_target=tokens * FLOPS_PER_TOKEN,
            train_seconds_to_target=tokens * (STEP_SECONDS / pl.col("global_batch_tokens") + TOKEN_SECONDS),
            tokens_to_target=tokens,
        )
        .select(*TARGETS)
    )


def write_runs(lab: Laboratory, folder: Path, runs: Iterable[Run] | None = None) -> None:
    """Write the sweep's folder as the harness would: manifest, run.json and evaluations.jsonl of every run."""
    runs = plan(lab) if runs is None else list(runs)
    write_json(folder / "sweep.json", records(lab, runs).manifest.model_dump(mode="json"))
    for run in runs:
        place = RunFolder(folder / "runs" / run.run_id)
        place.path.mkdir(parents=True)
        write_json(place.run, run_row(lab, run))
        place.evaluations.write_text("".join(json.dumps(row) + "\n" for row in evaluation_rows(lab, run)))


def evaluation_rows(lab: Laboratory, run: Run) -> list[dict[str, Value]]:
    marks = lab.first_mark_tokens * 2.0 ** (np.arange(0, 80) / 4)
    steps = np.unique([0, *np.ceil(marks[marks < run.budget] / run.batch).astype(int), run.budget // run.batch])
    rows = []
    for step in steps.tolist():
        tokens = step * run.batch
        loss = 2.0 * (np.exp(run.log_tokens) / tokens) ** lab.exponent if step else 4.85
        row: dict[str, Value] = dict.fromkeys(EVALUATION_COLUMNS, None)
        row |= {"run_id": run.run_id, "step": step, "tokens_seen": tokens, "learning_rate": run.peak_lr}
        row |= {"train_flops": tokens * FLOPS_PER_TOKEN, "train_seconds": _seconds(step, run.batch)}
        row |= {"val_loss_nats": loss + 0.1, "val_loss_averaged_nats": loss}
        rows.append(row)
    return rows


def _target_row(lab: Laboratory, run: Run) -> dict[str, Value]:
    tokens = float(np.exp(run.log_tokens))
    row: dict[str, Value] = {name: value for name, value in run_row(lab, run).items() if name in TARGETS}
    row |= {"stage": run.stage, "target_loss_nats": 2.0, "status": "reached", "tokens_to_target": tokens}
    row |= {"tuning": "", "bound_tokens": None, "lowest_loss_nats": 2.0 * (tokens / run.budget) ** lab.exponent}
    row |= {"steps_to_target": tokens / run.batch, "flops_to_target": tokens * FLOPS_PER_TOKEN}
    row |= {"train_seconds_to_target": _seconds(1, run.batch) * tokens / run.batch}
    return {name: row[name] for name in TARGETS}


def run_row(lab: Laboratory, run: Run) -> dict[str, Value]:
    steps = run.budget // run.batch
    row: dict[str, Value] = dict.fromkeys(RUN_COLUMNS, None)
    row |= {"run_id": run.run_id, "model": "lab", "optimizer": run.optimizer, "global_batch_tokens": run.batch}
    row |= {"token_budget": run.budget, "realized_tokens": run.budget, "peak_lr": run.peak_lr}
    row |= {
        "warmup_tokens": lab.warmup_tokens,
        "protocol": "constant_ema",
        "init_seed": run.seed,
        "data_seed": run.seed,
    }
    row |= {"sequence_length": 64, "corpus_fingerprint": "f1", "science_version": 1, "num_params": 115_000}
    row |= {"device": "test", "num_devices": 1, "status": run.status}
    row |= {"stop_reason": "budget" if run.status == "finished" else "non_finite_loss"}
    row |= {"step": steps, "tokens_seen": run.budget, "train_seconds": _seconds(steps, run.batch)}
    return row


def _seconds(steps: float, batch: int) -> float:
    return steps * (STEP_SECONDS + TOKEN_SECONDS * batch)


def _error(lab: Laboratory, optimizer: str, batch: int, rate: float, seed: int) -> float:
    common = ("seed", seed) if lab.sharing == "everywhere" else ("seed", seed, batch)
    own = _normal(lab, "own", optimizer, batch, f"{rate:.6g}", seed)
    return float(lab.noise_at(batch) * (np.sqrt(lab.shared) * _normal(lab, *common) + np.sqrt(1 - lab.shared) * own))


def _normal(lab: Laboratory, *name: object) -> float:
    """Draw the standard normal number that belongs to a name, whatever else is drawn."""
    return float(np.random.default_rng([lab.draw, zlib.crc32(repr(name).encode())]).standard_normal())
