"""The token ratio under three rules of the learning rate, against planted optima and curvatures."""

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.quantities.cells import estimate_cells
from analysis.quantities.pairs import pairs
from analysis.quantities.rate_rules import rate_rules
from tests.synthetic import Laboratory, Planted, targets_table

#: Rates over a factor of 64, so that the rate of the smallest batch lies inside the grid of the largest.
LAB = Laboratory(
    targets=(2.0,),
    warmup_tokens=0,
    noise=0.01,
    rates=tuple(2.0**power for power in range(-4, 3)),
    optimizers={"adamw": Planted(180_000.0, 2_000.0), "muon": Planted(120_000.0, 3_000.0, curvature=0.1)},
    grid_seeds=(0, 1, 4),
    batches=(256, 1024, 4096),
)


def rules(lab: Laboratory, baseline: str = "adamw") -> pl.DataFrame:
    return rate_rules(pairs(estimate_cells(targets_table(lab), 0.9), baseline), 0.9)


def ratios(table: pl.DataFrame, rule: str) -> list[Any]:
    return table.filter(rule=rule).sort("global_batch_tokens")["token_ratio"].to_list()


def true_ratio(batch: int) -> float:
    adamw, muon = LAB.optimizers.values()
    return float(np.exp(adamw.log_tokens(batch) - muon.log_tokens(batch)))


def test_rate_rules_give_the_planted_ratios() -> None:
    """The optima grow as √B, so that the fixed rate costs curvature × (log √(B / 256))² on either side."""
    table = rules(LAB)
    best = [true_ratio(batch) for batch in LAB.batches]
    assert ratios(table, "tuned") == pytest.approx(best, rel=0.02)
    assert ratios(table, "square_root") == pytest.approx(best, rel=0.02)
    fixed = [
        ratio * np.exp(0.2 * np.log(np.sqrt(batch / 256)) ** 2) for batch, ratio in zip(LAB.batches, best, strict=True)
    ]
    assert ratios(table, "fixed") == pytest.approx(fixed, rel=0.02)


def test_rate_rules_agree_at_the_reference_batch() -> None:
    at_reference = rules(replace(LAB, noise=0.1)).filter(global_batch_tokens=256)
    for name in ("token_ratio", "token_ratio_low", "token_ratio_high"):
        assert at_reference[name].to_list() == pytest.approx([at_reference[name][0]] * 3)


def test_rate_rules_of_swapped_optimizers_are_inverted() -> None:
    rows, swapped = rules(LAB), rules(LAB, baseline="muon")
    assert (1 / swapped["token_ratio"]).to_list() == pytest.approx(rows["token_ratio"].to_list())
    assert (1 / swapped["token_ratio_low"]).to_list() == pytest.approx(rows["token_ratio_high"].to_list())


def test_rate_rules_do_not_leave_the_grid() -> None:
    table = rules(replace(LAB, rates=(0.5, 1.0, 2.0), batches=(256, 1024, 16384)))
    row = table.filter(rule="fixed", global_batch_tokens=16384).row(0, named=True)
    assert (row["token_ratio"], row["verdict"]) == (None, "edge_of_grid")
    assert "AdamW: rate" in row["explanation"]
    assert None not in ratios(table, "square_root")


def test_rate_rules_with_two_rates_find_no_optimum() -> None:
    table = rules(replace(LAB, rates=(0.5, 2.0)))
    assert set(table["verdict"]) == {"not_identified"}
    assert set(table["token_ratio"]) == {None}


def test_rate_rules_without_repeated_runs_have_no_interval() -> None:
    table = rules(replace(LAB, grid_seeds=(0,), fresh_seeds=(2,)))
    assert set(table["verdict"]) == {"few_points"}
    assert None not in table["token_ratio"].to_list()
    assert set(table["token_ratio_low"]) == {None}


def test_rate_rules_cover_the_truth() -> None:
    """Without luck in the choice, the quadratics cover at the level of the interval."""
    hits = []
    for draw in range(60):
        tuned = rules(replace(LAB, noise=0.1, draw=draw)).filter(pl.col("rule") != "fixed")
        for batch, low, high in tuned.select("global_batch_tokens", "token_ratio_low", "token_ratio_high").iter_rows():
            hits.append(low is not None and low <= true_ratio(batch) <= high)
    assert 0.84 <= np.mean(hits) <= 0.97
