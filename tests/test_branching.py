"""The critical batch of branches from a checkpoint, and of gradient norms at two batch sizes."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from analysis.estimate import estimate
from analysis.inputs.records import Records
from analysis.inputs.variants import split_by_variants
from analysis.page.branching_figure import branched_batches as branched_batches_figure
from analysis.page.forest_figures import critical_batches
from analysis.page.parts import parts
from analysis.page.printed import fit_lines
from analysis.quantities.branching import branched_batches
from analysis.quantities.tuning import tuning
from analysis.statistics.branching import branch_noise, largest_harmless_batch, last_smoothed
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
        ([3.0, 3.1, np.inf, np.inf], 100.0, None, 200.0),  # no smaller batch says whether 100 does harm
    ],
)
def test_largest_harmless_batch_is_within_the_tolerance_of_all_smaller_ones(
    losses: list[float], value: float | None, low: float | None, high: float | None
) -> None:
    found = largest_harmless_batch(np.array([100.0, 200.0, 400.0, 800.0]), np.array(losses))
    assert (found.value, found.low, found.high) == (value, low, high)


def test_interval_of_the_harmless_batch_takes_in_the_batches_that_noise_leaves_open() -> None:
    batches, losses = np.array([100.0, 200.0, 400.0, 800.0]), np.array([3.0, 3.004, 3.008, 3.02])
    narrow, wide = (largest_harmless_batch(batches, losses, half_width) for half_width in (0.001, 0.005))
    assert (narrow.low, narrow.value, narrow.high) == (400.0, 400.0, 800.0)
    assert (wide.low, wide.value, wide.high) == (200.0, 400.0, 800.0)
    assert largest_harmless_batch(batches, losses, 0.011).high is None


def test_branch_noise_leaves_out_what_a_trunk_and_a_batch_add_to_all() -> None:
    random = np.random.default_rng(0)
    of_trunk, of_batch = random.normal(0, 1, (300, 1)), random.normal(0, 1, (1, 4))
    found = branch_noise([of_trunk + of_batch + random.normal(0, 0.02, (300, 4))])
    assert found is not None
    assert found.variance**0.5 == pytest.approx(0.02, rel=0.05)
    assert found.dof == 299 * 3
    assert branch_noise([np.zeros((1, 4))]) is None


def test_interval_of_the_harmless_batch_covers_the_truth_as_often_as_it_says() -> None:
    """Three trunks, branches at five batches from four points, and the fourth batch the last that does no harm."""
    random, hits = np.random.default_rng(1), []
    batches, truth = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([3.0, 3.0, 3.002, 3.006, 3.03])
    for _ in range(300):
        sets = [random.normal(0, 0.1, (3, 1)) + truth + random.normal(0, 0.004, (3, 5)) for _ in range(4)]
        noise = branch_noise(sets)
        assert noise is not None
        found = largest_harmless_batch(batches, sets[0].mean(axis=0), noise.half_width(3, 0.9))
        hits.append((found.low is None or found.low <= 8) and (found.high is None or found.high > 8))
    assert np.mean(hits) > 0.88


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


def over_training(losses: dict[int, dict[int, list[float]]], rates: tuple[float, ...] = (1.0,)) -> Records:
    """Return trunks at a batch of 256 and their branches: losses by branch point and batch, one for each seed.

    Of several `rates`, multiples of the best one, trunks and branches at the others are worse.
    """
    seeds = tuple(range(len(next(iter(next(iter(losses.values())).values())))))
    trunks = Laboratory(optimizers={"adamw": Planted()}, batches=(256,), rates=rates, grid_seeds=seeds, fresh_seeds=())
    runs, rows = [], []
    made = records(trunks)
    for trunk in made.runs.iter_rows(named=True):
        runs.append(trunk)
        excess = 0.1 * abs(np.log(trunk["peak_lr"] / 0.01))
        for at_tokens, by_batch in losses.items():
            for batch, of_seeds in by_batch.items():
                run_id = f"{trunk['run_id']}-{at_tokens}-{batch}"
                branch = {"parent_run_id": trunk["run_id"], "branch_tokens": at_tokens, "protocol": "branched_batch"}
                loss = of_seeds[trunk["init_seed"]]
                ended = {"status": "finished" if np.isfinite(loss) else "diverged"}
                rate = trunk["peak_lr"] * (batch / 256) ** 0.5
                own = {"run_id": run_id, "global_batch_tokens": batch, "peak_lr": rate}
                runs.append(trunk | own | branch | ended)
                steps = ((at_tokens, 9.0), (at_tokens + batch, loss + excess), (at_tokens + 2 * batch, loss + excess))
                rows += [
                    {"run_id": run_id, "step": tokens // batch, "tokens_seen": tokens, "val_loss_nats": value}
                    for tokens, value in steps
                    if np.isfinite(value)
                ]
    evaluations = pl.DataFrame(rows, schema_overrides=made.evaluations.schema)
    both = pl.concat([made.evaluations, evaluations], how="diagonal").select(made.evaluations.columns)
    return replace(made, runs=pl.DataFrame(runs, schema=made.runs.schema), evaluations=both)


GROWING = {
    65_536: {256: [3.0, 3.1], 512: [3.003, 3.104], 1024: [3.05, 3.15], 2048: [3.2, 3.3]},
    262_144: {256: [2.5, 2.6], 512: [2.5, 2.6], 1024: [2.504, 2.603], 2048: [2.54, 2.64]},
}


def test_branched_batches_give_a_row_for_each_point_of_training() -> None:
    rows = branched_batches(over_training(GROWING)).rows(named=True)
    assert [row["branch_tokens"] for row in rows] == [65_536, 262_144]
    assert [row["critical_batch_tokens"] for row in rows] == [512, 1024]
    assert [(row["critical_batch_tokens_low"], row["critical_batch_tokens_high"]) for row in rows] == [
        (512, 1024), (1024, 2048),
    ]  # fmt: skip
    assert {row["verdict"] for row in rows} == {"ok"}
    assert "the trunk is at a batch of 256" in rows[0]["explanation"]


def test_branches_are_read_after_the_state_that_they_start_from() -> None:
    """The loss of the state itself, which is planted far off, counts for nothing."""
    (row, _) = branched_batches(over_training(GROWING)).rows(named=True)
    assert row["critical_batch_tokens"] == 512


def test_branches_of_the_best_trunk_count() -> None:
    several = branched_batches(over_training(GROWING, rates=(0.25, 1.0, 4.0)))
    one = branched_batches(over_training(GROWING))
    assert several["critical_batch_tokens"].to_list() == one["critical_batch_tokens"].to_list()
    assert several["num_batches"].to_list() == [4, 4]


def test_batch_at_which_a_branch_diverged_does_harm() -> None:
    losses = {65_536: {256: [3.0, 3.1], 512: [3.0, np.inf], 1024: [3.0, 3.1]}}
    (row,) = branched_batches(over_training(losses)).rows(named=True)
    assert row["critical_batch_tokens"] is None
    assert row["reasons"].startswith("not_identified")


def test_branches_without_the_one_at_the_batch_of_the_trunk_are_refused() -> None:
    (row,) = branched_batches(over_training({65_536: {512: [3.0, 3.1], 1024: [3.2, 3.3]}})).rows(named=True)
    assert (row["verdict"], row["critical_batch_tokens"]) == ("refused", None)
    assert "nothing to compare with" in row["explanation"]


def test_trunks_with_a_branch_missing_are_left_out_and_said() -> None:
    whole = over_training(GROWING)
    lost = whole.runs.filter(pl.col("branch_tokens") == 65_536, pl.col("global_batch_tokens") == 512)["run_id"][0]
    row = branched_batches(replace(whole, runs=whole.runs.filter(pl.col("run_id") != lost))).row(0, named=True)
    assert (row["critical_batch_tokens"], row["branch_tokens"]) == (512, 65_536)
    assert "1 trunk left out, of which a branch is missing" in row["explanation"]


def test_one_trunk_gives_an_interval_between_batches_alone() -> None:
    losses = {65_536: {256: [3.0], 512: [3.003], 1024: [3.05]}}
    (row,) = branched_batches(over_training(losses)).rows(named=True)
    assert (row["critical_batch_tokens_low"], row["critical_batch_tokens_high"]) == (512, 1024)
    assert "one trunk: the interval is between batches tried" in row["explanation"]


def test_tuning_counts_the_tokens_of_a_branch_from_where_it_starts() -> None:
    whole = over_training(GROWING)
    trunks = whole.runs.filter(pl.col("parent_run_id").is_null())["tokens_seen"].sum()
    (row,) = tuning(whole).rows(named=True)
    assert row["tokens"] == trunks + sum(2 * 2 * batch * 2 for batch in (256, 512, 1024, 2048))


def test_branches_are_no_variants_of_their_trunk_nor_of_each_other() -> None:
    base: dict[str, Any] = {"schedule": {"kind": "constant"}, "evaluation": {"first_mark_tokens": 1}}
    decays = [
        base | {"schedule": {"kind": "wsd"}, "branch": {"parent": "t", "at_tokens": at, "kind": "decay"}}
        for at in (1, 2)
    ]
    batches = [
        base | {"evaluation": {"first_mark_tokens": at}, "branch": {"parent": "t", "at_tokens": at, "kind": "batch"}}
        for at in (1, 2)
    ]
    run = {"model": "115k", "optimizer": "adamw", "global_batch_tokens": 512, "tuning": ""}
    rows = [run | {"config_json": json.dumps(config)} for config in (base, *decays, *batches)]
    assert set(split_by_variants(pl.DataFrame(rows))["model"]) == {"115k"}
    other = run | {"config_json": json.dumps(base | {"schedule": {"kind": "cosine"}})}
    assert split_by_variants(pl.DataFrame([*rows, other]))["model"].n_unique() > 1


def test_fit_prints_the_critical_batch_over_training() -> None:
    lines = list(fit_lines(estimate(over_training(GROWING))))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(*lines, sep="\n")
    text = console.export_text()
    (line,) = (line for line in text.splitlines() if "256K" in line and "AdamW" in line and "[" in line)
    assert "[1.02K, 2.05K]" in line


def test_critical_batch_over_training_is_drawn_with_its_intervals() -> None:
    found = estimate(over_training(GROWING))
    (part,) = (part for part in parts(found) if part.protocol == "branched_batch")
    figure = branched_batches_figure(part.estimates)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    line = next(line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None")
    assert line.get_xydata().tolist() == [[65_536, 512], [262_144, 1024]]
    assert isinstance(critical_batches(part.estimates), str)
    assert branched_batches_figure(estimate(records(Laboratory()))).startswith("No branches")  # type: ignore[union-attr]


def test_a_batch_that_never_does_harm_is_drawn_as_an_arrow() -> None:
    harmless = {at: {batch: [3.0, 3.1] for batch in (256, 512)} for at in (65_536, 262_144)}
    (part,) = (part for part in parts(estimate(over_training(harmless))) if part.protocol == "branched_batch")
    figure = branched_batches_figure(part.estimates)
    assert isinstance(figure, Figure)
    assert [line.get_marker() for line in figure.axes[0].lines].count("^") == 2


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
