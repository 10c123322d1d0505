"""Sweeps whose runs are planted: the grid of a small sweep, and rounds of tuning without a disk."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.config import RunConfig
from sweeps.grid import expand
from sweeps.spec import SweepSpec
from sweeps.tuning.cells import by_cell, tuned_cells
from sweeps.tuning.proposals import Bench, Limits, propose
from sweeps.tuning.tune import ADAPTIVE_LEVEL
from tests.planted_training import TARGET_NATS, Plant, spent_tokens, targets_of
from tests.sweep_examples import changed, prepared

BATCHES = (256, 1024, 4096)
LIMITS = Limits(trials=40, level=ADAPTIVE_LEVEL)


def planted_spec(
    rates: Mapping[str, Sequence[float]],
    batches: Sequence[int] = BATCHES,
    seeds: Sequence[int] = (0, 1),
    budget_tokens: int = 600_000,
    **keys: Any,
) -> SweepSpec:
    """Return a sweep over `rates` of each optimizer; runs stop at the planted target."""
    sweep = changed(
        optimizers={name: {"learning_rate": list(own)} for name, own in rates.items()},
        grid={"global_batch_tokens": list(batches), "seed": list(seeds)},
        token_budget={batch: budget_tokens * (1 + batch // 2048) // batch * batch for batch in batches},
        targets_nats=[TARGET_NATS],
        machine={"accelerator": "cpu"},
    )
    sweep["base"] |= {"averaging": {"kind": "power_ema"}, "stop_at_loss_nats": TARGET_NATS - 1e-6}
    sweep["base"] |= keys
    return SweepSpec.parse(sweep, source="planted")


def planted_runs(spec: SweepSpec) -> list[RunConfig]:
    return expand(spec, prepared)


def tuned(
    plant: Plant,
    runs: Sequence[RunConfig],
    limits: Limits = LIMITS,
    axes: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[Bench, list[list[str]]]:
    """Tune until nothing is proposed; return the last bench, and the reasons round by round."""
    axes = axes or {}
    cells, listed = tuned_cells(runs, tuple(axes)), list(runs)
    reasons: list[list[str]] = []
    while True:
        bench = Bench(cells, by_cell(cells, listed, tuple(axes)), targets_of(plant, listed), axes, limits.level)
        more = propose(bench, limits, spent_tokens(plant, listed))
        if not more:
            return bench, reasons
        assert not {each.run.run_id for each in more} & {run.run_id for run in listed}
        listed += [each.run for each in more]
        reasons.append([each.why for each in more])
