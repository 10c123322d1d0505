"""Dominance: step functions compared by hand, invariants, planted truth, intervals that cover it."""

from dataclasses import replace

import polars as pl
import pytest

from analysis.quantities.cells import Cells, estimate_cells
from analysis.quantities.dominance import dominance
from analysis.quantities.frontier import frontier
from analysis.quantities.pairs import pairs
from analysis.schemas import DOMINANCE
from analysis.verdicts import names_of
from tests.synthetic import Laboratory, Planted, records, targets_table

LAB = Laboratory(targets=(2.0,), noise=0.05)
TWICE = {"adamw": Planted(200_000.0, 2_000.0), "muon": Planted(100_000.0, 2_000.0)}


def table(lab: Laboratory, cells: Cells | None = None) -> pl.DataFrame:
    cells = cells or estimate_cells(targets_table(lab), 0.9)
    made, _ = frontier(records(lab), cells, 0.9)
    return dominance(made, pairs(cells, "adamw"), 0.9)


def test_dominance_of_half_the_tokens_is_at_least_a_factor_of_two_everywhere() -> None:
    rows = table(replace(LAB, optimizers=TWICE, noise=1e-4, fresh_seeds=(2, 3)))
    assert list(rows.columns) == list(DOMINANCE)
    assert set(rows.select("kind", "cost").rows()) == {
        (kind, cost) for kind in ("measured", "projected") for cost in ("device_seconds", "train_flops")
    }
    assert set(rows["share"]) == {1.0}
    assert (rows["cost_ratio"] > 1.99).all()
    single = rows.filter(kind="measured", cost="device_seconds")
    assert single["cost_ratio"].item() == pytest.approx(2.0, rel=1e-3)
    assert "that one deadline is compared" in single["explanation"].item()


def test_dominance_carries_the_caveats_of_the_cells_on_the_frontiers() -> None:
    rows = table(replace(LAB, warmup_tokens=65_536))
    caveats = rows.filter(pl.col("verdict") == "warmup_confounded")
    assert caveats.height > 0
    assert all("Muon at" in words or "AdamW at" in words for words in caveats["explanation"])
    assert {name for reasons in caveats["reasons"] for name in names_of(reasons)} == {"warmup_confounded"}


def test_dominance_without_repeated_runs_has_no_interval_and_says_so() -> None:
    rows = table(replace(LAB, grid_seeds=(0,), fresh_seeds=()))
    assert rows["cost_ratio"].is_not_null().all()
    assert rows["cost_ratio_low"].is_null().all()
    assert rows["share_high"].is_null().all()
    assert all("few_points" in reasons for reasons in rows["reasons"])


def test_dominance_needs_the_baseline() -> None:
    assert table(replace(LAB, optimizers={"muon": TWICE["muon"]})).is_empty()


def test_dominance_is_the_same_twice() -> None:
    assert table(LAB).equals(table(LAB))


@pytest.mark.slow
def test_dominance_intervals_cover_the_planted_ratio() -> None:
    """Seeds, their sharing and the grid as in the quickstart; nominal 90 %."""
    exact = replace(LAB, noise=1e-6)
    truth = {row["cost"]: row["cost_ratio"] for row in table(exact).filter(kind="projected").iter_rows(named=True)}
    made, covered, num = records(exact), dict.fromkeys(truth, 0), 200
    for draw in range(num):
        lab = replace(LAB, noise=0.1, draw=draw)
        cells = estimate_cells(targets_table(lab), 0.9)
        rows = dominance(frontier(made, cells, 0.9)[0], pairs(cells, "adamw"), 0.9).filter(kind="projected")
        for row in rows.iter_rows(named=True):
            covered[row["cost"]] += row["cost_ratio_low"] <= truth[row["cost"]] <= row["cost_ratio_high"]
    assert all(0.84 <= hits / num <= 0.97 for hits in covered.values()), covered
