"""Scaling laws of the critical batch: the published one, planted ones, and where there is no interval."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis.quantities.cells import estimate_cells
from analysis.quantities.critical_batch import critical_batches
from analysis.quantities.curve_fits import curve_fits
from analysis.quantities.laws import laws
from analysis.schemas import CRITICAL_BATCHES, TARGETS, polars_schema, table
from analysis.statistics.fit import fit_saturating
from analysis.statistics.noise import Errors
from analysis.statistics.power_law import fit_power_law
from tests.synthetic import Laboratory, Planted, targets_table
from tests.test_fit import BATCH_SEQUENCES, ZHANG

SEQUENCE = 512
TARGET_LOSSES = (3.42, 3.24, 3.07, 2.92, 2.736)
MODELS = pl.DataFrame(
    {"model": [f"{row[0]}M" for row in ZHANG], "num_params_nonembedding": [row[0] * 10**6 for row in ZHANG]}
)


@pytest.fixture(scope="module")
def published() -> pl.DataFrame:
    """Return the laws of the table of arXiv 2410.21676."""
    lab = Laboratory(optimizers={"adamw": Planted()}, batches=(256,), rates=(1.0,), grid_seeds=(0,), fresh_seeds=())
    template = targets_table(lab).row(0, named=True) | {"peak_lr": None}
    rows = []
    for (millions, steps, _), loss in zip(ZHANG, TARGET_LOSSES, strict=True):
        for sequences, own in zip(BATCH_SEQUENCES, steps, strict=True):
            batch = int(sequences) * SEQUENCE
            row = {"run_id": f"{millions}M-{batch}", "model": f"{millions}M", "global_batch_tokens": batch}
            row |= {"target_loss_nats": loss, "tokens_to_target": float(own * batch), "steps_to_target": float(own)}
            rows.append(template | row | {"warmup_tokens": 0, "tokens_seen": own * batch})
    batches = critical_batches(curve_fits(estimate_cells(table(rows, TARGETS), 0.9), 0.9), 256 * SEQUENCE)[0]
    return laws(batches, MODELS, 0.9)


def law(frame: pl.DataFrame, definition: str, by: str, **more: Any) -> list[dict[str, Any]]:
    return frame.filter(definition=definition, by=by, **more).rows(named=True)


def test_law_of_model_size_is_the_published_one(published: pl.DataFrame) -> None:
    (row,) = law(published, "overhead_20pct", "num_params_nonembedding")
    assert row["exponent"] == pytest.approx(0.46828, abs=1e-5)
    assert row["prefactor"] == pytest.approx(73.96, abs=0.005)  # in tokens and parameters
    assert row["prefactor"] / SEQUENCE * 1e6 ** row["exponent"] == pytest.approx(93.197, abs=0.001)
    assert (row["exponent_high"] - row["exponent_low"]) / 2 == pytest.approx(0.028, abs=0.0005)
    assert row["prefactor_low"] < row["prefactor"] < row["prefactor_high"]
    assert (row["num_points"], row["verdict"], row["model"], row["target_loss_nats"]) == (5, "ok", None, None)


def test_slope_over_intercept_grows_faster_than_the_batch_of_20_percent(published: pl.DataFrame) -> None:
    (row,) = law(published, "emin_over_smin", "num_params_nonembedding")
    assert row["exponent"] == pytest.approx(0.619, abs=0.0005)
    assert (row["exponent_high"] - row["exponent_low"]) / 2 == pytest.approx(0.071, abs=0.0005)


def test_five_models_give_a_joint_law_without_an_interval(published: pl.DataFrame) -> None:
    rows = law(published, "emin_over_smin", "tokens_to_target, num_params_nonembedding")
    assert [row["term"] for row in rows] == ["num_params_nonembedding", "tokens_to_target"]
    assert {row["verdict"] for row in rows} == {"few_points"}
    assert all(row["exponent"] is not None and row["exponent_low"] is None for row in rows)


def critical(points: list[tuple[str, float, float, float | None]], reasons: str = "") -> pl.DataFrame:
    """Return rows of critical batches: model, target loss, tokens to the target, critical batch."""
    rows = [
        dict.fromkeys(CRITICAL_BATCHES)
        | {"model": model, "optimizer": "adamw", "target_loss_nats": loss, "protocol": "constant_ema"}
        | {"definition": "emin_over_smin", "tokens_to_target": tokens, "critical_batch_tokens": batch}
        | {"reasons": "not_identified" if batch is None else reasons, "verdict": reasons or "ok"}
        for model, loss, tokens, batch in points
    ]
    return pl.DataFrame(rows, schema=polars_schema(CRITICAL_BATCHES), orient="row")


SIZES = {name: size for size, name in enumerate(("a", "b", "c", "d", "e", "f", "g"), 1)}
SIZED = pl.DataFrame({"model": list(SIZES), "num_params_nonembedding": [10**6 * 2**n for n in SIZES.values()]})


def joint_points(models: str) -> list[tuple[str, float, float, float | None]]:
    tokens = dict(zip(SIZES, [1e8, 3e8, 2e8, 9e8, 5e8, 2e9, 1e9], strict=True))
    return [(m, 3.0, tokens[m], 7.0 * tokens[m] ** 0.4 * (1e6 * 2 ** SIZES[m]) ** 0.1) for m in models]


def test_joint_law_recovers_both_exponents_with_intervals_from_six_models_on() -> None:
    found = laws(critical(joint_points("abcdef")), SIZED, 0.9)
    params, tokens = law(found, "emin_over_smin", "tokens_to_target, num_params_nonembedding")
    assert (params["exponent"], tokens["exponent"]) == (pytest.approx(0.1), pytest.approx(0.4))
    assert params["prefactor"] == pytest.approx(7.0)
    assert params["exponent_low"] is not None
    assert params["target_loss_nats"] == 3.0  # the loss that all share
    assert not law(found, "emin_over_smin", "target_loss_nats")


def test_variables_that_go_together_are_not_told_apart() -> None:
    points: list[tuple[str, float, float, float | None]] = [(m, 3.0, 1e3 * 2.0**n, 2.0**n) for m, n in SIZES.items()]
    rows = law(laws(critical(points), SIZED, 0.9), "emin_over_smin", "tokens_to_target, num_params_nonembedding")
    assert {row["verdict"] for row in rows} == {"not_identified"}
    assert all(row["exponent"] is None and row["prefactor"] is None for row in rows)


def at_losses(*batches: float) -> pl.DataFrame:
    """Return critical batches of one model at as many losses."""
    return critical([("a", 2.0 + place / 10, 1e8 / 2**place, batch) for place, batch in enumerate(batches)])


def test_critical_batches_that_are_all_the_same_have_no_exponent() -> None:
    rows = laws(at_losses(256.0, 256.0, 256.0), SIZED, 0.9).rows(named=True)
    assert [(row["exponent"], row["prefactor"], row["verdict"]) for row in rows] == [(None, None, "not_identified")] * 2
    assert {row["reasons"] for row in rows} == {"not_identified"}


def test_one_step_of_the_batches_that_were_run_is_no_law_of_the_best_of_them() -> None:
    grid, points = (256, 512, 1024), at_losses(512.0, 256.0, 256.0)
    on_grid = points.with_columns(definition=pl.lit("token_optimal"))
    assert set(laws(on_grid, SIZED, 0.9, grid)["verdict"]) == {"not_identified"}
    assert laws(points, SIZED, 0.9, grid)["exponent"].is_not_null().all()
    further = at_losses(1024.0, 512.0, 256.0).with_columns(definition=pl.lit("token_optimal"))
    assert laws(further, SIZED, 0.9, grid)["exponent"].is_not_null().all()


def test_losses_of_the_same_runs_give_an_exponent_without_an_interval() -> None:
    points: list[tuple[str, float, float, float | None]] = [
        ("a", loss, 1e8 / loss, 100.0 * loss**-4) for loss in np.linspace(2.0, 4.0, 8).tolist()
    ]
    (row,) = law(laws(critical(points), SIZED, 0.9), "emin_over_smin", "target_loss_nats")
    assert (row["model"], row["target_loss_nats"], row["num_points"]) == ("a", None, 8)
    assert row["exponent"] == pytest.approx(-4.0)
    assert (row["exponent_low"], row["verdict"]) == (None, "few_points")
    assert "same runs" in row["explanation"]


def test_models_at_several_losses_have_a_law_at_each_loss() -> None:
    points: list[tuple[str, float, float, float | None]] = [
        (m, loss, 1e8, loss * 10 * (1e6 * 2**n) ** 0.5) for m, n in SIZES.items() for loss in (2.5, 3.0)
    ]
    rows = law(laws(critical(points), SIZED, 0.9), "emin_over_smin", "num_params_nonembedding")
    assert [row["target_loss_nats"] for row in rows] == [2.5, 3.0]
    assert [row["exponent"] for row in rows] == [pytest.approx(0.5)] * 2
    assert [row["prefactor"] for row in rows] == [pytest.approx(25.0), pytest.approx(30.0)]


def test_a_critical_batch_without_a_value_is_left_out_and_named() -> None:
    points = joint_points("abcdef")
    points[2] = (*points[2][:3], None)
    (row,) = law(laws(critical(points), SIZED, 0.9), "emin_over_smin", "num_params_nonembedding")
    assert row["num_points"] == 5
    assert "left out: c" in row["explanation"]


def test_what_stands_against_a_critical_batch_stands_against_the_law() -> None:
    (row,) = law(
        laws(critical(joint_points("abcde"), "edge_of_grid"), SIZED, 0.9), "emin_over_smin", "tokens_to_target"
    )
    assert row["verdict"] == "edge_of_grid"
    assert "5 of the 5 critical batches" in row["explanation"]


@pytest.mark.parametrize("models", ["", "a"])
def test_no_law_goes_through_fewer_than_two_points(models: str) -> None:
    assert laws(critical(joint_points(models)), SIZED, 0.9).is_empty()


def test_models_of_unknown_size_have_no_law_of_size() -> None:
    unknown = SIZED.with_columns(num_params_nonembedding=pl.lit(None, pl.Int64))
    found = laws(critical(joint_points("abcde")), unknown, 0.9)
    assert set(found["by"]) == {"tokens_to_target"}


@pytest.mark.slow
@pytest.mark.parametrize("span", [3.0, 10.0])
def test_a_law_over_tokens_covers_although_both_come_of_one_fit(span: float) -> None:
    """Five models whose T_min span so much, four batches, three seeds with 5 % noise."""
    random, batches = np.random.default_rng(0), 4.0 ** np.arange(4, 8)
    error, hits, misses = 0.05 / 3**0.5, [], []
    for _ in range(150):
        points = []
        for share in np.linspace(-0.5, 0.5, 5):
            log_t = np.log(1e5 * span**share * (1 + batches / (3000.0 * span ** (0.46 * share))))
            log_t += random.normal(0, error, 4)
            fit = fit_saturating(batches, log_t, 0.9, Errors(np.eye(4) * error**2, 8, 8))
            points.append((np.exp(fit.log_b_crit), np.exp(np.interp(fit.log_b_crit, np.log(batches), log_t))))
        y, x = np.array(points).T
        found = fit_power_law(y, x[:, None], 0.9)
        assert found is not None
        (exponent,) = found.exponents
        hits.append(exponent.low < 0.46 < exponent.high)  # type: ignore[operator]
        misses.append(exponent.value - 0.46)  # type: ignore[operator]
    assert 0.83 <= np.mean(hits) <= 0.96
    assert abs(np.mean(misses)) < 0.45 * np.std(misses)


def test_intervals_of_power_laws_cover_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    x = np.array([[1.0], [2.0], [5.0], [9.0], [20.0]])
    hits = []
    for _ in range(1000):
        y = 3.0 * x[:, 0] ** 0.5 * np.exp(0.1 * random.standard_normal(5))
        found = fit_power_law(y, x, 0.9)
        assert found is not None
        (exponent,) = found.exponents
        hits.append([e.low < truth < e.high for e, truth in ((exponent, 0.5), (found.prefactor, 3.0))])  # type: ignore[operator]
    assert np.all(np.abs(np.mean(hits, axis=0) - 0.9) < 0.03)
