"""Telescoping on a family of loss surfaces whose optimum is known at every width."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.statistics.surfaces import fit_surface
from analysis.statistics.telescoping import Losses, Telescope, check_doubling, finite_width, num_points, telescope

Array = NDArray[np.float64]

WIDTHS = (32, 64, 128, 256)
LIMIT, ALPHA = np.array([-5.0, -1.3]), np.array([20.0, -8.0])
BASE = (np.arange(-8.0, 0.0), np.arange(-5.0, 3.0))


def planted(noise: float, seed: int = 0) -> Losses:
    """Loss surfaces with their minimum at limit − alpha / width."""
    generator, known = np.random.default_rng(seed), dict[tuple[Any, ...], float]()
    hessian = np.array([[0.04, 0.01], [0.01, 0.02]])

    def losses(width: int, points: Array) -> Array:
        away = points - (LIMIT - ALPHA / width)
        exact = 2.0 + 4.0 / width + 0.5 * np.einsum("ni,ij,nj->n", away, hessian, away)
        keys = [(width, *point) for point in np.round(points, 6).tolist()]
        return np.array(
            [
                known.setdefault(key, value + noise * generator.standard_normal())
                for key, value in zip(keys, exact, strict=True)
            ]
        )

    return losses


def sizes(found: Telescope) -> list[int]:
    return [len(each.points) for each in found.levels]


@pytest.mark.parametrize(
    ("base", "k", "expected"),
    [(8, 2, [8, 5, 3, 1]), (8, 1, [8, 3, 1, 1]), (8, 3, [8, 7, 5, 3]), (5, 2, [5, 3, 3, 1]), (6, 2, [6, 3, 3, 1])],
)
def test_points_of_each_hyperparameter_shrink_as_in_the_source(base: int, k: int, expected: list[int]) -> None:
    assert [num_points(base, doublings, k) for doublings in range(4)] == expected


def test_exact_surfaces_give_the_exact_optimum_and_alpha() -> None:
    found = telescope(WIDTHS, BASE, planted(0.0))
    assert sizes(found) == [64, 25, 9, 1]
    for place, each in enumerate(finite_width(found.levels, 256)):
        assert each.limit.value == pytest.approx(LIMIT[place], abs=1e-6)
        assert each.alpha.value == pytest.approx(ALPHA[place], abs=1e-3)
        assert each.at_final.value == pytest.approx(LIMIT[place] - ALPHA[place] / 256, abs=1e-6)
        assert each.finite_width_error(64) == pytest.approx(ALPHA[place] / 64, abs=1e-4)


def test_final_point_is_put_at_the_optimum_of_its_width() -> None:
    found = telescope(WIDTHS, BASE, planted(0.0))
    assert found.levels[-1].points[0] == pytest.approx(LIMIT - ALPHA / 256, abs=1e-6)
    noisy = telescope(WIDTHS, BASE, planted(0.003))
    assert noisy.levels[-1].points[0] == pytest.approx(LIMIT - ALPHA / 256, abs=0.5)


def test_intervals_cover_the_optimum_of_the_final_width_as_stated() -> None:
    truth, covered = LIMIT - ALPHA / 256, np.zeros(2)
    for seed in range(300):
        found = finite_width(telescope(WIDTHS, BASE, planted(0.003, seed)).levels, 256, level=0.9)
        for place, each in enumerate(found):
            assert each.at_final.low is not None
            assert each.at_final.high is not None
            covered[place] += each.at_final.low <= truth[place] <= each.at_final.high
    assert (covered / 300 > 0.87).all()
    assert (covered / 300 < 0.99).all()


def test_each_level_costs_about_as_much_as_the_first_and_all_far_less_than_the_full_grid_at_the_end() -> None:
    found = telescope(WIDTHS, BASE, planted(0.003))
    costs = [len(each.points) * (each.width / 32) ** 2 for each in found.levels]
    assert max(costs) <= 2.5 * costs[0]
    assert sum(costs) < 0.1 * 64 * (256 / 32) ** 2


def test_one_hyperparameter_is_telescoped_too_with_the_noise_of_the_base_level() -> None:
    truth, covered = LIMIT[0] - ALPHA[0] / 256, 0
    for seed in range(200):
        generator = np.random.default_rng(seed)

        def losses(width: int, points: Array, generator: np.random.Generator = generator) -> Array:
            away = points[:, 0] - (LIMIT[0] - ALPHA[0] / width)
            return 2.0 + 0.02 * away**2 + 0.001 * generator.standard_normal(len(points))

        found = telescope(WIDTHS, (np.arange(9) - 9.0,), losses)
        (line,) = finite_width(found.levels, 256)
        assert sizes(found)[2:] == [1, 1]
        assert line.at_final.low is not None
        assert line.at_final.high is not None
        covered += line.at_final.low <= truth <= line.at_final.high
    assert 0.85 < covered / 200 < 0.97


def test_grid_grows_towards_an_optimum_outside_it() -> None:
    away = tuple(values - 6.0 for values in BASE)
    found = telescope(WIDTHS, away, planted(0.0))
    assert len(found.levels[0].grid[0]) > 8
    assert not any(each.edge for each in found.levels)
    assert found.levels[0].optimum == pytest.approx(LIMIT - ALPHA / 32, abs=1e-6)
    far = telescope(WIDTHS[:2], tuple(values - 40.0 for values in BASE), planted(0.0))
    assert far.levels[0].edge
    assert finite_width(far.levels, 64) == []


def test_diverged_points_take_no_part() -> None:
    exact = planted(0.0)

    def losses(width: int, points: Array) -> Array:
        return np.where(points[:, 0] > -3.5, np.inf, exact(width, points))

    found = telescope(WIDTHS, BASE, losses)
    assert found.levels[-1].points[0] == pytest.approx(LIMIT - ALPHA / 256, abs=1e-6)


def test_unknown_losses_are_wanted_level_by_level_and_the_end_is_that_of_knowing_all() -> None:
    exact, known = planted(0.003), set[tuple[Any, ...]]()

    def losses(width: int, points: Array) -> Array:
        told = np.array([(width, *point) in known for point in np.round(points, 6).tolist()])
        return np.where(told, exact(width, points), np.nan)

    asked = []
    while (found := telescope(WIDTHS, BASE, losses)).wanted is not None:
        asked.append((found.wanted_width, len(found.wanted)))
        known |= {(found.wanted_width, *point) for point in np.round(found.wanted, 6).tolist()}
    assert [width for width, _ in asked] == sorted(width for width, _ in asked if width)
    assert dict(asked).keys() == set(WIDTHS)
    assert sum(count for _, count in asked) == sum(sizes(found))


@pytest.mark.parametrize("make", [lambda x: x[:, 0] ** 2 - x[:, 1] ** 2, lambda x: -(x**2).sum(axis=1)])
def test_surface_without_a_minimum_has_no_optimum(make: Callable[[Array], Array]) -> None:
    x = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), axis=-1).reshape(-1, 2)
    assert fit_surface(x, make(x)) is None


def test_optimum_of_a_surface_varies_as_its_covariance_says() -> None:
    generator = np.random.default_rng(0)
    x = np.stack(np.meshgrid(np.arange(-2.0, 3.0), np.arange(-2.0, 3.0)), axis=-1).reshape(-1, 2)
    exact = (x[:, 0] - 0.3) ** 2 + 0.5 * (x[:, 1] + 0.2) ** 2 + 0.3 * x[:, 0] * x[:, 1]
    surfaces = [fit_surface(x, exact + 0.05 * generator.standard_normal(25)) for _ in range(500)]
    found = [each for each in surfaces if each is not None]
    stated = np.mean([each.covariance for each in found], axis=0)
    assert np.cov(np.array([each.optimum for each in found]).T) == pytest.approx(stated, rel=0.15, abs=1e-5)


@pytest.mark.parametrize("widths", [(32,), (32, 64, 256), (32, 48)])
def test_widths_that_are_not_doubled_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="telescoping goes through doubled widths"):
        check_doubling(widths)
