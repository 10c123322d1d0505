"""The critical batch of branches from a checkpoint, and of gradient norms at two batch sizes."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.inputs.records import Records
from analysis.quantities.branching import branched_batches
from analysis.statistics.branching import largest_harmless_batch, last_smoothed
from analysis.statistics.noise_scale import noise_scale
from tests.synthetic import Laboratory, Planted, records


def test_last_smoothed_halves_the_distance_to_each_new_loss() -> None:
    assert last_smoothed([4.0, 2.0, 2.0]) == 2.5
    assert last_smoothed([3.0]) == 3.0


@pytest.mark.parametrize(
    ("losses", "value", "low", "high"),
    [
        ([3.0, 3.0, 3.005, 3.02], 400.0, 400.0, 800.0),
        ([3.0, 2.98, 3.0, 3.0], 200.0, 200.0, 400.0),  # 400 is .02 above the loss of 200
        ([3.0, 3.02, 3.009, 3.02], 400.0, 400.0, 800.0),  # a bump in between does not end the search
        ([3.0, 2.99, 2.98, 2.97], None, 800.0, None),
    ],
)
def test_largest_harmless_batch_is_within_the_tolerance_of_all_smaller_ones(
    losses: list[float], value: float | None, low: float, high: float | None
) -> None:
    found = largest_harmless_batch(np.array([100.0, 200.0, 400.0, 800.0]), np.array(losses))
    assert (found.value, found.low, found.high) == (value, low, high)


def branches(finals: dict[int, float]) -> Records:
    """Return the records of branches whose validation loss stays at the given one."""
    lab = Laboratory(optimizers={"adamw": Planted()}, batches=tuple(finals), rates=(1.0,), fresh_seeds=())
    made = records(lab)
    loss = made.evaluations.join(made.runs.select("run_id", "global_batch_tokens"), on="run_id", maintain_order="left")
    known = loss["global_batch_tokens"].replace_strict(finals, return_dtype=pl.Float64)
    runs = made.runs.with_columns(protocol=pl.lit("branched_batch"))
    return replace(made, runs=runs, evaluations=made.evaluations.with_columns(val_loss_nats=known))


def test_branched_batches_give_one_row_an_optimizer() -> None:
    (row,) = branched_batches(branches({256: 2.5, 512: 2.505, 1024: 2.508, 2048: 2.6})).rows(named=True)
    assert (row["definition"], row["protocol"], row["optimizer"]) == ("branched", "branched_batch", "adamw")
    assert row["critical_batch_tokens"] == row["critical_batch_tokens_low"] == 1024
    assert row["critical_batch_tokens_high"] == 2048
    assert (row["verdict"], row["target_loss_nats"]) == ("ok", None)


def test_branches_that_never_lose_do_not_identify_their_batch() -> None:
    (row,) = branched_batches(branches({256: 2.5, 512: 2.5})).rows(named=True)
    assert (row["verdict"], row["critical_batch_tokens"], row["critical_batch_tokens_low"]) == (
        "not_identified",
        None,
        512,
    )
    (alone,) = branched_batches(branches({256: 2.5})).rows(named=True)
    assert "few_points" in alone["reasons"]


def test_runs_of_other_protocols_are_no_branches() -> None:
    assert branched_batches(records(Laboratory())).is_empty()


def norms(batch: int, measurements: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Draw norms of gradients with |G|² = 4 and tr Σ = 800, so that the noise scale is 200."""
    random = np.random.default_rng(seed)
    gradient = np.full(100, 0.2)
    noise = random.normal(0.0, np.sqrt(8.0 / batch), size=(measurements, 100))
    return np.asarray(np.linalg.norm(gradient + noise, axis=1))


def test_noise_scale_is_the_ratio_of_unbiased_means() -> None:
    found = noise_scale(32, 512, norms(32, 4000, 0), norms(512, 4000, 1), 0.9)
    assert found.value == pytest.approx(200, rel=0.05)
    exact = noise_scale(1.0, 4.0, np.sqrt([4.0 + 800.0]), np.sqrt([4.0 + 200.0]), 0.9)
    assert (exact.value, exact.low, exact.high) == (pytest.approx(200), None, None)


def test_noise_scale_covers_the_truth_as_often_as_it_says() -> None:
    hits = []
    for draw in range(400):
        found = noise_scale(32, 512, norms(32, 20, 2 * draw), norms(512, 20, 2 * draw + 1), 0.9)
        hits.append((found.low is None or found.low < 200) and (found.high is None or found.high > 200))
    assert 0.86 < np.mean(hits) < 0.94


def test_noise_scale_without_a_visible_gradient_has_no_upper_end() -> None:
    found = noise_scale(1, 2, norms(1, 10, 0), norms(2, 10, 1), 0.9)
    assert found.high is None


def test_noise_scale_needs_two_batch_sizes() -> None:
    with pytest.raises(ValueError, match="two batch sizes, the smaller first: got 64 and 64"):
        noise_scale(64, 64, np.ones(3), np.ones(3), 0.9)
