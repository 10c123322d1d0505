"""The pooled noise: its variance, what runs of one seed share, and its degrees of freedom."""

import numpy as np
import polars as pl
import pytest

from analysis.statistics.noise import Noise, lack_of_fit, pooled, t_quantile


def runs(values: dict[tuple[str, str, str], float]) -> pl.DataFrame:
    rows = [(f"{cell} {rate}", cell, seed, value) for (cell, rate, seed), value in values.items()]
    return pl.DataFrame(rows, schema=["group", "cell", "seed", "value"], orient="row")


def drawn(rng: np.random.Generator, everywhere: float, cell: float, own: float) -> pl.DataFrame:
    """Draw 4 cells x 3 rates x 8 seeds with three components of the error, given as standard deviations."""
    seeds, in_cell = rng.normal(size=8) * everywhere, rng.normal(size=(4, 8)) * cell
    return runs(
        {
            (f"c{c}", f"r{r}", f"s{s}"): seeds[s] + in_cell[c, s] + rng.normal() * own + 10 * c + r
            for c in range(4)
            for r in range(3)
            for s in range(8)
        }
    )


def test_pooled_recovers_planted_components() -> None:
    rng = np.random.default_rng(0)
    found = [noise for _ in range(60) if (noise := pooled(drawn(rng, 0.3, 0.2, 0.1))) is not None]
    assert np.mean([noise.variance for noise in found]) == pytest.approx(0.14, rel=0.1)
    assert np.mean([noise.same_cell for noise in found]) == pytest.approx(0.13, rel=0.1)
    assert np.mean([noise.other_cell for noise in found]) == pytest.approx(0.09, rel=0.15)


def test_pooled_counts_all_degrees_of_freedom_only_of_independent_groups() -> None:
    rng = np.random.default_rng(1)
    alone, together = pooled(drawn(rng, 0.0, 0.0, 0.1)), pooled(drawn(rng, 0.3, 0.0, 0.01))
    assert alone is not None
    assert together is not None
    assert alone.dof == pytest.approx(84, rel=0.15)  # 12 groups x 7
    assert together.dof == pytest.approx(7, rel=0.05)  # one group's worth
    assert together.contrast_dof > 30


@pytest.mark.parametrize("values", [{}, {("c", "r", "a"): 1.0}, {("c", "r", s): float(s == "a") for s in "abc"}])
def test_pooled_needs_three_degrees_of_freedom(values: dict[tuple[str, str, str], float]) -> None:
    frame = runs(values).cast({"value": pl.Float64, "cell": pl.String, "group": pl.String, "seed": pl.String})
    assert pooled(frame) is None


@pytest.mark.parametrize("rounding", [0.0, 1e-15])
def test_pooled_refuses_runs_that_do_not_vary(rounding: float) -> None:
    assert pooled(runs({("c", "r", s): 1.0 + rounding * x for x, s in enumerate("abcdef")})) is None


def test_runs_that_differ_by_their_seed_alone_leave_an_invertible_covariance() -> None:
    values = {(f"c{c}", "r", s): float(c + x) for c in range(3) for x, s in enumerate("abc")}
    noise = pooled(runs(values))
    assert noise is not None
    covariance = noise.of_means([["a"], ["a"], ["a"]]).covariance
    assert np.all(np.linalg.eigvalsh(covariance) > 1e-4 * noise.variance)


def test_errors_of_means_shrink_with_seeds_and_share_what_seeds_share() -> None:
    noise = Noise(variance=1.0, same_cell=0.6, other_cell=0.5, dof=9.0, contrast_dof=9.0)
    covariance = noise.of_means([["0", "1"], ["0", "1"], ["2"]]).covariance
    assert covariance == pytest.approx(np.array([[0.5, 0.25, 0.0], [0.25, 0.5, 0.0], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize(
    ("seeds", "contrast_dof"),
    [([["0", "1"], ["1", "0"]], 20.0), ([["0", "1"], ["2"]], 5.0), ([["0", "1"], ["0"]], 5.0)],
)
def test_contrasts_gain_degrees_of_freedom_only_between_cells_of_the_same_seeds(
    seeds: list[list[str]], contrast_dof: float
) -> None:
    noise = Noise(variance=1.0, same_cell=0.6, other_cell=0.5, dof=5.0, contrast_dof=20.0)
    errors = noise.of_means(seeds)
    assert (errors.dof, errors.contrast_dof) == (5.0, contrast_dof)


def test_t_quantile_matches_the_table() -> None:
    assert t_quantile(0.9, 3) == pytest.approx(2.353363, abs=1e-6)
    assert t_quantile(0.95, 10) == pytest.approx(2.228139, abs=1e-6)


def test_error_of_a_difference_leaves_out_what_both_cells_share() -> None:
    noise = Noise(variance=1.0, same_cell=0.6, other_cell=0.5, dof=9.0, contrast_dof=9.0)
    errors = noise.of_means([["0", "1"], ["0", "1"], ["2"]])
    assert errors.of_difference(0, 1) == pytest.approx(0.5**0.5)
    assert errors.of_difference(0, 2) == pytest.approx(1.5**0.5)


def test_lack_of_fit_is_the_upper_tail_of_f() -> None:
    assert lack_of_fit(3.885294, spare=2, dof=12) == pytest.approx(0.05, abs=1e-6)
    assert lack_of_fit(3.885294, spare=0, dof=12) is None


def test_pooled_takes_bounds_for_what_they_are() -> None:
    rng, bound = np.random.default_rng(5), 0.84  # a fifth of the runs
    found, survivors = [], []
    for _ in range(60):
        values = rng.standard_normal((12, 3))
        frame = runs({(f"c{c}", "r", f"s{c}{s}"): values[c, s] for c in range(12) for s in range(3)})
        cut = frame.with_columns(
            side=(pl.col("value") > bound).cast(int), value=pl.col("value").clip(upper_bound=bound)
        )
        noises = pooled(cut), pooled(cut.filter((pl.col("side") == 0).all().over("group")))
        found += [noises[0].variance] if noises[0] else []
        survivors += [noises[1].variance] if noises[1] else []
    assert np.mean(found) == pytest.approx(1.0, abs=0.15)
    assert np.mean(survivors) < 0.7


def growing(rng: np.random.Generator, growth: float) -> pl.DataFrame:
    """Draw 4 batches x 3 rates x 10 seeds whose variance is 0.01 (B / 2048)^growth."""
    rows = [
        (f"{batch} {rate}", str(batch), f"{batch} {rate} {seed}", 0.1 * (batch / 2048) ** (growth / 2) * rng.normal())
        for batch in (256, 1024, 4096, 16384)
        for rate in range(3)
        for seed in range(10)
    ]
    frame = pl.DataFrame(rows, schema=["group", "cell", "seed", "value"], orient="row")
    return frame.with_columns(log_batch=pl.col("cell").cast(float).log())


def test_pooled_finds_a_variance_that_grows_with_the_batch() -> None:
    noise = pooled(growing(np.random.default_rng(6), 0.5))
    assert noise is not None
    assert abs(noise.growth - 0.5) < 2 * noise.growth_error
    assert noise.deviation_at(np.log([256, 16384])) == pytest.approx([0.1 / 8**0.25, 0.1 * 8**0.25], rel=0.25)


def test_pooled_seldom_finds_a_growth_that_is_not_there() -> None:
    rng = np.random.default_rng(7)
    found = [pooled(growing(rng, 0.0)) for _ in range(100)]
    assert np.mean([noise is not None and noise.growth != 0.0 for noise in found]) < 0.4  # by chance a quarter


def test_errors_of_means_follow_the_growth_and_lose_degrees_of_freedom_away_from_its_centre() -> None:
    noise = Noise(0.01, 0.0, 0.0, dof=20.0, contrast_dof=20.0, growth=0.5, growth_error=0.2, centre=float(np.log(1024)))
    errors = noise.of_means([["a"], ["b"]], np.log([1024, 4096]))
    assert np.diag(errors.covariance) == pytest.approx([0.01, 0.02])
    assert noise.dof_at(np.log(1024)) == pytest.approx(20.0)
    assert noise.dof_at(np.log(4096)) == pytest.approx(2 / (0.1 + (0.2 * np.log(4)) ** 2))


def test_errors_of_means_add_what_bounds_lose() -> None:
    noise = Noise(0.01, 0.0, 0.0, dof=20.0, contrast_dof=20.0)
    assert noise.of_means([["a", "b"]], lost=[0.25]).covariance[0, 0] == pytest.approx(0.01 * 0.75)


def test_pooled_recovers_what_seeds_share_from_the_survivors_of_bounds() -> None:
    rng, found, bound = np.random.default_rng(8), [], 0.84
    for _ in range(60):
        seeds, own = rng.standard_normal((1, 8)), rng.standard_normal((24, 8))
        values = np.sqrt(0.5) * (seeds + own)
        rows = [
            (f"c{c} {s // 2}", f"c{c}", f"s{s}", min(values[c, s], bound), int(values[c, s] > bound))
            for c in range(24)
            for s in range(8)
        ]
        frame = pl.DataFrame(rows, schema=["group", "cell", "seed", "value", "side"], orient="row")
        noise = pooled(frame)
        assert noise is not None
        found.append(noise.other_cell / noise.variance)
    assert np.mean(found) == pytest.approx(0.5, abs=0.08)
