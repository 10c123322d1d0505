"""Planted tables of final losses: Records whose loss laws, gaps and speedups are known."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.inputs.records import Records, from_frames
from analysis.schemas import EVALUATIONS, polars_schema
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, PlannedRun, SweepManifest, Value

FLOPS_PER_TOKEN, SECONDS_PER_TOKEN = 6e5, 1e-5


@dataclass(frozen=True)
class Law:
    """L_B(D) = floor + height (gain D / (D_0 (1 + B / b_crit)))^-exponent at the best rate .02 sqrt(B / 1024).

    `drift` is added to the exponent per factor of e in batch. D_0 is 10^6 tokens.
    """

    gain: float = 1.0
    floor: float = 1.5
    height: float = 1.2
    exponent: float = 0.4
    b_crit: float = 4_096.0
    drift: float = 0.0
    curvature: float = 0.03

    def loss(self, batch: int, tokens: float) -> float:
        beta = self.exponent + self.drift * np.log(batch / 1024)
        return float(self.floor + self.height * (self.gain * tokens / (1e6 * (1 + batch / self.b_crit))) ** -beta)

    def log_tokens(self, batch: int, loss: float) -> float:
        """Return log T at a target loss."""
        beta = self.exponent + self.drift * np.log(batch / 1024)
        effective = np.log((loss - self.floor) / self.height) / -beta
        return float(effective + np.log(1e6 * (1 + batch / self.b_crit) / self.gain))

    def optimum(self, batch: int) -> float:
        return float(0.02 * np.sqrt(batch / 1024))


@dataclass(frozen=True)
class _Plan:
    stage: Literal["grid", "confirm"]
    optimizer: str
    batch: int
    budget: int
    peak_lr: float
    seed: int

    @property
    def tokens(self) -> int:
        return self.budget // self.batch * self.batch

    @property
    def run_id(self) -> str:
        return f"{self.optimizer}-b{self.batch}-d{self.budget}-lr{self.peak_lr:.4g}-s{self.seed}"


@dataclass(frozen=True)
class Finals:
    """Runs at every optimizer, batch, budget, rate and seed; a normal error of `noise` nats, `shared` by the seed."""

    optimizers: Mapping[str, Law] = field(default_factory=lambda: {"adamw": Law(), "muon": Law(gain=1.5)})
    batches: tuple[int, ...] = (1024, 4096, 16384)
    budgets: tuple[int, ...] = (2**20, 2**21, 2**22, 2**23)
    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0, 1)
    fresh_seeds: tuple[int, ...] = ()
    noise: float = 0.004
    shared: float = 0.5
    protocol: str = "decayed"
    targets: tuple[float, ...] = ()
    draw: int = 0

    def records(self) -> Records:
        plans = list(self._plan())
        errors = self._errors([plan.seed for plan in plans])
        manifest = SweepManifest(
            name="finals",
            baseline=next(iter(self.optimizers)),
            targets_nats=self.targets,
            runs=tuple(PlannedRun(run_id=plan.run_id, stage=plan.stage) for plan in plans),
        )
        runs = [self._run_row(plan) for plan in plans]
        evaluations = [self._last_row(plan, error) for plan, error in zip(plans, errors, strict=True)]
        return from_frames(
            manifest,
            pl.DataFrame(runs, schema=polars_schema(RUN_COLUMNS), orient="row"),
            pl.DataFrame(evaluations, schema=polars_schema(EVALUATIONS), orient="row"),
        )

    def _plan(self) -> Iterator[_Plan]:
        for name, batch, budget in product(self.optimizers, self.batches, self.budgets):
            best = self.optimizers[name].optimum(batch)
            for factor, seed in product(self.rates, self.seeds):
                yield _Plan("grid", name, batch, budget, best * factor, seed)
            for seed in self.fresh_seeds:
                yield _Plan("confirm", name, batch, budget, best, seed)

    def _errors(self, seeds: list[int]) -> NDArray[np.float64]:
        rng = np.random.default_rng(self.draw)
        common = dict(zip(sorted(set(seeds)), rng.standard_normal(len(set(seeds))), strict=True))
        own = rng.standard_normal(len(seeds))
        of_seed = np.array([common[seed] for seed in seeds])
        return np.asarray(self.noise * (np.sqrt(self.shared) * of_seed + np.sqrt(1 - self.shared) * own))

    def _run_row(self, plan: _Plan) -> dict[str, Value]:
        row: dict[str, Value] = dict.fromkeys(RUN_COLUMNS, None)
        row |= {"run_id": plan.run_id, "model": "lab", "optimizer": plan.optimizer, "protocol": self.protocol}
        row |= {"global_batch_tokens": plan.batch, "peak_lr": plan.peak_lr, "token_budget": plan.budget}
        row |= {"realized_tokens": plan.tokens, "tokens_seen": plan.tokens, "step": plan.tokens // plan.batch}
        row |= {"init_seed": plan.seed, "data_seed": plan.seed, "status": "finished", "stop_reason": "budget"}
        return row | {"warmup_tokens": 0, "num_devices": 1, "train_seconds": plan.tokens * SECONDS_PER_TOKEN}

    def _last_row(self, plan: _Plan, error: float) -> dict[str, Value]:
        law = self.optimizers[plan.optimizer]
        off = np.log(plan.peak_lr / law.optimum(plan.batch))
        row: dict[str, Value] = dict.fromkeys(EVALUATION_COLUMNS, None)
        row |= {"run_id": plan.run_id, "step": plan.tokens // plan.batch, "tokens_seen": plan.tokens}
        row |= {"train_flops": plan.tokens * FLOPS_PER_TOKEN, "train_seconds": plan.tokens * SECONDS_PER_TOKEN}
        return row | {"val_loss_nats": law.loss(plan.batch, plan.tokens) + law.curvature * off**2 + error}
