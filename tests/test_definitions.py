"""Every definition of the critical batch size on planted tables of T(B), and what holds for all of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtr

from analysis.quantities.cells import Cells, estimate_cells
from analysis.quantities.critical_batch import critical_batches
from analysis.quantities.curve_fits import curve_fits
from analysis.schemas import TARGETS, table
from analysis.vocabulary import DEFINITIONS_OF_TOKENS
from tests.synthetic import Laboratory, Planted, targets_table


def of(cells: Cells, definition: str, reference: int | None = None, **options: str) -> dict[str, Any]:
    rows = critical_batches(curve_fits(cells, 0.9, **options), reference, [definition])[0]
    assert rows.height == 1
    return rows.row(0, named=True)


def given_tokens(tokens: dict[int, float], seeds: int = 1, noise: float = 0.0, draw: int = 4) -> Cells:
    """Return the cells of a table with one T a batch and seed."""
    random = np.random.default_rng(draw)
    lab = Laboratory(optimizers={"adamw": Planted()}, batches=(256,), rates=(1.0,), fresh_seeds=())
    template = targets_table(replace(lab, grid_seeds=(0,))).row(0, named=True) | {"peak_lr": None}
    rows = []
    for batch, own in tokens.items():
        for seed in range(seeds):
            value = own * float(np.exp(noise * random.standard_normal()))
            name = {"run_id": f"b{batch}-s{seed}", "init_seed": seed, "data_seed": seed}
            size = {"global_batch_tokens": batch, "tokens_to_target": value, "steps_to_target": value / batch}
            rows.append(template | name | size | {"warmup_tokens": 0, "tokens_seen": int(2 * value)})
    return estimate_cells(table(rows, TARGETS), 0.9)


BATCHES = [256 * 2**power for power in range(8)]


def bent(alpha: float, b_crit: float = 4096.0) -> dict[int, float]:
    return {batch: 1e6 * (1 + (batch / b_crit) ** alpha) for batch in BATCHES}


def kinked(b_star: float, slope: float) -> dict[int, float]:
    return {batch: 1e6 * max(1.0, batch / b_star) ** (1 + slope) for batch in BATCHES}


def test_free_exponent_finds_the_batch_of_twice_the_tokens_and_prefers_itself_where_alpha_is_not_one() -> None:
    row = of(given_tokens(bent(1.6), seeds=3, noise=0.02), "free_exponent")
    assert row["critical_batch_tokens_low"] < 4096 < row["critical_batch_tokens_high"]
    assert row["exponent_low"] < 1.6 < row["exponent_high"]
    assert "lower for the free exponent" in row["explanation"]
    plain = of(given_tokens(bent(1.0), seeds=3, noise=0.02), "free_exponent")
    assert "lower for α = 1" in plain["explanation"]


@pytest.mark.parametrize("alpha", [0.75, 1.0, 1.4])
def test_emin_over_smin_holds_the_batch_of_twice_the_tokens_whatever_the_exponent(alpha: float) -> None:
    row = of(given_tokens(bent(alpha), seeds=3, noise=0.05), "emin_over_smin")
    assert row["critical_batch_tokens_low"] < 4096 < row["critical_batch_tokens_high"]
    assert row["critical_batch_tokens_low"] <= row["critical_batch_tokens"] <= row["critical_batch_tokens_high"]


def test_emin_over_smin_takes_another_exponent_only_where_replicates_refute_one() -> None:
    refuted = of(given_tokens(bent(1.6), seeds=3, noise=0.02), "emin_over_smin")
    assert refuted["exponent"] == pytest.approx(1.6, rel=0.1)
    assert refuted["critical_batch_tokens"] == pytest.approx(4096, rel=0.05)
    assert refuted["verdict"] == "ok"
    assert "the replicates speak against α = 1" in refuted["explanation"]
    without_replicates = of(given_tokens(bent(1.6)), "emin_over_smin")
    assert without_replicates["exponent"] == 1.0
    assert (without_replicates["exponent_low"], without_replicates["exponent_high"]) == (None, None)


def test_piecewise_kink_gives_the_batch_and_the_slope_beyond() -> None:
    row = of(given_tokens(kinked(3000.0, -0.4), seeds=3, noise=0.01), "piecewise_kink")
    assert row["critical_batch_tokens_low"] < 3000 < row["critical_batch_tokens_high"]
    assert row["tail_slope_low"] < -0.4 < row["tail_slope_high"]
    assert row["tail_slope"] == pytest.approx(-0.4, abs=0.05)
    assert row["verdict"] == "ok"


@pytest.mark.parametrize("definition", ["free_exponent", "piecewise_kink"])
def test_three_parameters_at_six_batches_give_a_number_without_an_interval(definition: str) -> None:
    tokens = dict(list(bent(1.3, 2048.0).items())[:6])
    row = of(given_tokens(tokens, seeds=3, noise=0.02), definition)
    assert "few_points" in row["reasons"]
    assert row["critical_batch_tokens"] is not None
    assert (row["critical_batch_tokens_low"], row["critical_batch_tokens_high"]) == (None, None)
    three = of(given_tokens(dict(list(tokens.items())[:3]), seeds=3, noise=0.02), definition)
    assert three["critical_batch_tokens"] is None
    assert three["verdict"] == "few_points"


def test_token_optimal_is_the_largest_batch_with_the_least_tokens() -> None:
    tokens = {256: 1.3e6, 1024: 1e6, 4096: 1e6, 16384: 2e6}
    assert of(given_tokens(tokens), "token_optimal")["critical_batch_tokens"] == 4096
    row = of(given_tokens(tokens, seeds=4, noise=0.02), "token_optimal")
    assert row["critical_batch_tokens_low"] == 1024
    assert row["critical_batch_tokens_high"] == 4096


def test_token_optimal_5pct_lies_between_batches() -> None:
    tokens = {256: 1e6, 1024: 1e6, 4096: 1.1e6, 16384: 2e6}
    row = of(given_tokens(tokens), "token_optimal_5pct")
    share = np.log(1.05) / np.log(1.1)
    assert row["critical_batch_tokens"] == pytest.approx(1024 * 4**share)
    sure = of(given_tokens(tokens, seeds=4, noise=0.005), "token_optimal_5pct")
    assert 1024 < sure["critical_batch_tokens_low"] < sure["critical_batch_tokens"]
    assert sure["critical_batch_tokens"] < sure["critical_batch_tokens_high"] < 4096


@pytest.mark.parametrize("definition", ["token_optimal", "token_optimal_5pct"])
def test_a_t_that_still_falls_at_the_largest_batch_has_no_optimal_one(definition: str) -> None:
    row = of(given_tokens({256: 1.2e6, 1024: 1.1e6, 4096: 1e6}, seeds=3, noise=0.01), definition)
    assert row["verdict"] == "not_identified"
    assert row["critical_batch_tokens"] is None
    assert row["critical_batch_tokens_low"] == pytest.approx(4096)
    assert row["critical_batch_tokens_high"] is None


def without(cells: Cells, batch: int, low: float | None = None) -> Cells:
    """Return the cells with no T at a batch, but what T exceeds there."""
    gone = pl.col("global_batch_tokens") == batch
    tokens = pl.when(~gone).then("tokens_to_target")
    bound = pl.when(gone).then(pl.lit(low, pl.Float64)).otherwise("tokens_to_target_low")
    reasons = pl.when(gone).then(pl.lit("diverged")).otherwise("reasons")
    changed = {"tokens_to_target": tokens, "tokens_to_target_low": bound, "reasons": reasons}
    return replace(cells, cells=cells.cells.with_columns(**changed))


@pytest.mark.parametrize("definition", ["token_optimal", "token_optimal_5pct"])
def test_a_batch_without_tokens_beside_the_cheapest_leaves_the_optimum_open(definition: str) -> None:
    tokens = {256: 1.3e6, 1024: 1e6, 4096: 1.01e6, 16384: 1.5e6, 65536: 3e6}
    whole = given_tokens(tokens, seeds=4, noise=0.002)
    row = of(without(whole, 4096), definition)
    assert (row["critical_batch_tokens"], row["critical_batch_tokens_high"]) == (None, None)
    assert {"not_identified", "diverged"} <= set(row["reasons"].split(", "))
    assert "T may be as low at batch 4K, where it is not known" in row["explanation"]
    excluded = of(without(whole, 4096, low=1.4e6), definition)
    assert excluded["critical_batch_tokens"] is not None
    assert excluded["critical_batch_tokens_high"] is not None


def test_a_batch_that_diverged_is_left_out_as_diverged() -> None:
    row = of(without(given_tokens(bent(1.0), seeds=3, noise=0.02), 512), "emin_over_smin")
    assert row["verdict"] == "diverged"
    assert "left out, since runs diverged: batch 512" in row["explanation"]


def valley(batches: Sequence[int], b_crit: float = 3_000.0, b_fall: float = 150.0) -> dict[int, float]:
    return {batch: 1e6 * (1 + batch / b_crit) * (1 + b_fall / batch) for batch in batches}


def twice_the_least(b_crit: float = 3_000.0, b_fall: float = 150.0) -> float:
    """Return the larger root of (1 + B / B_c) (1 + B_0 / B) = 2 (1 + √(B_0 / B_c))²."""
    ratio = b_fall / b_crit
    middle = 2 * (1 + np.sqrt(ratio)) ** 2 - 1 - ratio
    return float(b_crit * (middle + np.sqrt(middle**2 - 4 * ratio)) / 2)


def test_emin_over_smin_of_a_smooth_u_is_where_tokens_are_twice_their_least() -> None:
    batches = [64 * 4**power for power in range(5)]
    row = of(given_tokens(valley(batches), seeds=3, noise=0.01), "emin_over_smin")
    assert row["verdict"] == "non_monotone"
    assert row["critical_batch_tokens"] == pytest.approx(twice_the_least(), rel=0.05)
    assert row["critical_batch_tokens_low"] < twice_the_least() < row["critical_batch_tokens_high"]
    assert row["t_min_tokens"] == pytest.approx(1e6 * (1 + 0.05**0.5) ** 2, rel=0.03)
    assert (row["exponent"], row["s_min_steps"], row["aicc"]) == (None, None, None)
    assert "the critical batch is where T is twice its least" in row["explanation"]


def test_overhead_of_a_smooth_u_is_where_steps_are_a_fifth_above_linear_scaling() -> None:
    batches = [64 * 2**power for power in range(9)]
    star = of(given_tokens(valley(batches), seeds=3, noise=0.003), "overhead_20pct", 1024)["critical_batch_tokens"]
    of_reference, of_star = (valley([batch])[batch] for batch in (1024, star))
    assert of_star == pytest.approx(1.2 * of_reference, rel=0.01)


def test_a_curve_whose_exponent_has_a_prior_has_no_aicc() -> None:
    row = of(given_tokens(bent(1.6), seeds=3, noise=0.02), "emin_over_smin")
    assert "the replicates speak against α = 1" in row["explanation"]
    assert row["aicc"] is None
    assert of(given_tokens(bent(1.0), seeds=3, noise=0.02), "emin_over_smin")["aicc"] is not None


@pytest.mark.parametrize(("b_crit", "open_", "known"), [(1.5e6, "high", "low"), (30.0, "low", "high")])
@pytest.mark.parametrize("definition", ["emin_over_smin", "free_exponent"])
def test_an_extrapolated_knee_has_no_end_beyond_the_batches(
    definition: str, b_crit: float, open_: str, known: str
) -> None:
    row = of(given_tokens(bent(1.0, b_crit), seeds=3, noise=0.0005), definition)
    assert row["verdict"] == "not_identified"
    assert row[f"critical_batch_tokens_{open_}"] is None
    assert row[f"critical_batch_tokens_{known}"] == pytest.approx(b_crit, rel=0.5)


def interval_width(row: dict[str, Any]) -> float:
    return float(np.log(row["critical_batch_tokens_high"] / row["critical_batch_tokens_low"]))


@pytest.mark.parametrize("definition", ["emin_over_smin", "free_exponent"])
def test_a_misfit_widens_the_interval_with_twelve_seeds_as_with_nine(definition: str) -> None:
    zigzag = {batch: tokens * np.exp(0.12 * (-1) ** place) for place, (batch, tokens) in enumerate(bent(1.0).items())}
    nine, twelve = (of(given_tokens(zigzag, seeds, noise=0.03), definition) for seeds in (9, 12))
    assert "misfit" in nine["reasons"]
    assert "misfit" in twelve["reasons"]
    assert interval_width(twelve) == pytest.approx(interval_width(nine), rel=0.25)


def test_the_exponent_is_tested_with_the_spare_points_where_the_free_curve_misfits() -> None:
    zigzag = {batch: tokens * np.exp(0.1 * (-1) ** place) for place, (batch, tokens) in enumerate(bent(1.5).items())}
    cells = given_tokens(zigzag, seeds=3, noise=0.01)
    fits = next(iter(curve_fits(cells, 0.9).values()))
    plain, free, errors = fits.saturating, fits.free_exponent, fits.series.errors
    assert plain is not None
    assert free is not None
    assert errors is not None
    spare = len(fits.series.batches) - 3
    assert spare < errors.contrast_dof
    squares = (plain.misfit - free.misfit) / free.scale.variance
    assert fits.against_saturation == pytest.approx(2 * stdtr(spare, -np.sqrt(squares)))


@pytest.mark.parametrize(
    ("definition", "words"),
    [("branched", "branched_batch"), ("noise_scale", "gradient norms"), ("overhead_20pct", "reference batch")],
)
def test_a_definition_without_its_input_is_refused_where_it_is_asked_for(definition: str, words: str) -> None:
    row = of(given_tokens(bent(1.0)), definition)
    assert row["verdict"] == "refused"
    assert words in row["explanation"]
    assert row["critical_batch_tokens"] is None


def test_an_unknown_definition_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match="'kink' is unknown: one of emin_over_smin, overhead_20pct"):
        of(given_tokens(bent(1.0)), "kink")


def test_what_least_squares_compares_is_an_option_and_named_in_the_row() -> None:
    cells = given_tokens(bent(1.2))
    rows = [of(cells, "emin_over_smin", residuals=name) for name in ("log", "raw_tokens", "raw_steps")]
    rows.append(of(cells, "emin_over_smin", loss="soft_l1"))
    assert [row["residuals"] for row in rows] == ["log", "raw_tokens", "raw_steps", "log, soft_l1"]
    assert len({row["critical_batch_tokens"] for row in rows}) == 4


def test_ten_seeds_take_their_intervals_from_resamples() -> None:
    cells = given_tokens(bent(1.0), seeds=10, noise=0.05)
    assert cells.resampled
    row = of(cells, "emin_over_smin")
    without = of(replace(cells, resampled={}), "emin_over_smin")
    assert row["critical_batch_tokens"] == without["critical_batch_tokens"]
    assert row["critical_batch_tokens_low"] != without["critical_batch_tokens_low"]
    widths = [np.log(one["critical_batch_tokens_high"] / one["critical_batch_tokens_low"]) for one in (row, without)]
    assert widths[0] == pytest.approx(widths[1], rel=0.5)


@settings(max_examples=15, deadline=None)
@given(power=st.integers(-3, 8), draw=st.integers(0, 5), seeds=st.sampled_from([1, 3]))
def test_scaling_all_tokens_scales_every_critical_batch(power: int, draw: int, seeds: int) -> None:
    factor = 2**power
    tokens = bent(1.2)
    small = given_tokens(tokens, seeds, 0.03, draw)
    large = given_tokens({int(b * factor): t * factor for b, t in tokens.items()}, seeds, 0.03, draw)
    before, after = (
        critical_batches(curve_fits(cells, 0.9), reference)[0]
        for cells, reference in ((small, 256), (large, 256 * factor))
    )
    assert before["definition"].to_list() == after["definition"].to_list() == sorted(DEFINITIONS_OF_TOKENS)
    assert before["verdict"].to_list() == after["verdict"].to_list()
    for name in ("critical_batch_tokens", "critical_batch_tokens_low", "critical_batch_tokens_high", "t_min_tokens"):
        for one, other in zip(before[name], after[name], strict=True):
            assert other == (None if one is None else pytest.approx(one * factor, rel=1e-4))


def share_not_identified(b_crit: float, batches: tuple[int, ...], noise: float, seeds: int) -> float:
    tokens = {batch: 1e6 * (1 + batch / b_crit) for batch in batches}
    rows = [of(given_tokens(tokens, seeds, noise, draw), "emin_over_smin") for draw in range(20)]
    assert all((row["critical_batch_tokens"] is None) == (row["verdict"] == "not_identified") for row in rows)
    return sum(row["verdict"] == "not_identified" for row in rows) / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [(256, 1024, 4096, 16384), tuple(BATCHES)])
@pytest.mark.parametrize(("noise", "seeds"), [(0.05, 3), (0.1, 2)])
def test_a_knee_is_identified_inside_the_batches_and_not_outside(
    batches: tuple[int, ...], noise: float, seeds: int
) -> None:
    first, last = batches[0], batches[-1]
    for factor in (2.0, 4.0):
        assert share_not_identified(last * factor, batches, noise, seeds) >= 0.95
        assert share_not_identified(first / factor, batches, noise, seeds) >= 0.95
        assert share_not_identified(last / factor, batches, noise, seeds) <= 0.10
        assert share_not_identified(first * factor, batches, noise, seeds) <= 0.10
