"""Intervals cover what they claim, on the design of the quickstart: many sweeps are drawn and each is estimated."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from analysis.quantities.cells import estimate_cells
from analysis.quantities.critical_batch import critical_batches
from analysis.quantities.token_ratio import token_ratios
from tests.synthetic import Laboratory, targets_table

SWEEPS = 300


def covers(row: dict[str, float | None], name: str, truth: float) -> bool:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return (low is None or low <= truth) and (high is None or truth <= high)


def coverage(lab: Laboratory) -> dict[str, float]:
    """Return the share of intervals at 90 % that hold the truth, by quantity."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for draw in range(SWEEPS):
        estimated = estimate_cells(targets_table(replace(lab, draw=draw)), 0.9)
        for row in estimated.cells.iter_rows(named=True):
            truth = np.exp(lab.optimizers[row["optimizer"]].log_tokens(row["global_batch_tokens"]))
            hits["cell"].append(covers(row, "tokens_to_target", truth))
        for row in critical_batches(estimated, 0.9)[0].filter(definition="emin_over_smin").iter_rows(named=True):
            planted = lab.optimizers[row["optimizer"]]
            hits["critical batch"].append(covers(row, "critical_batch_tokens", planted.b_crit))
            hits["T_min"].append(covers(row, "t_min_tokens", planted.t_min))
        for row in token_ratios(estimated, "adamw", 0.9)[0].iter_rows(named=True):
            logs = [lab.optimizers[name].log_tokens(row["global_batch_tokens"]) for name in ("adamw", "muon")]
            hits["ratio"].append(covers(row, "token_ratio", np.exp(logs[0] - logs[1])))
    return {name: float(np.mean(hit)) for name, hit in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("fresh_seeds", [(2,), (2, 3)])
@pytest.mark.parametrize(("shared", "sharing"), [(0.0, "everywhere"), (0.5, "everywhere"), (0.5, "batch")])
def test_intervals_of_ninety_percent_cover_about_ninety(
    fresh_seeds: tuple[int, ...], shared: float, sharing: str
) -> None:
    found = coverage(Laboratory(fresh_seeds=fresh_seeds, shared=shared, sharing=sharing, warmup_tokens=0))
    assert 0.87 <= found.pop("T_min") <= 0.95
    assert all(0.87 <= share <= 0.93 for share in found.values()), found
