"""Which rates a cell wants next, by what is known of it."""

import pytest

from analysis.quantities.rate_search import RateState, rate_states, wanted_rates
from sweeps.tuning.cells import by_cell, relabelled, tuned_cells
from tests.planted_sweeps import planted_runs, planted_spec
from tests.planted_training import Plant, targets_of

THREE = (0.01, 0.02, 0.04)


def state(
    low: float | None, optimum: float | None, high: float | None, tried: tuple[float, ...] = THREE, **known: object
) -> RateState:
    fields = {"usable": tried, "best": 0.02, "curvature": 0.3, "log_tokens": 12.0, "has_noise": True} | known
    return RateState(tried=tried, optimum=optimum, low=low, high=high, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("known", "why", "rates"),
    [
        (state(0.017, 0.02, 0.024), None, ()),  # interior and narrow: settled
        (state(0.022, 0.03, 0.05), "edge", (0.08,)),
        (state(0.004, 0.008, 0.012), "edge", (0.005,)),
        (state(0.008, 0.02, 0.05), "edge", (0.005, 0.08)),  # so wide that it may lie on either side
        (state(None, None, None, best=0.04), "edge", (0.08,)),
        (state(None, None, None, tried=(0.02,)), "start", (0.01, 0.04)),
        (state(0.011, 0.021, 0.039), "between", (0.02828,)),
        (state(0.011, 0.021, 0.039, tried=(0.01, 0.014, 0.02, 0.028, 0.04)), "seeds", (0.02, 0.028, 0.014)),
        (state(0.022, 0.03, 0.05, usable=(0.01, 0.02)), "between", (0.02828,)),  # runs at 0.04 failed: a wall
        (state(None, None, None, usable=(), best=0.04), "edge", (0.08,)),  # towards the lowest loss
        (state(None, None, None, usable=(), best=0.02), None, ()),
        (state(None, None, None, usable=(), best=None), None, ()),
    ],
)
def test_wanted_rates_follow_from_the_interval(known: RateState, why: str | None, rates: tuple[float, ...]) -> None:
    wanted = wanted_rates(known, factor=2.0)
    assert (wanted.why if wanted else None, wanted.rates if wanted else ()) == (why, rates)


def test_rate_states_find_planted_optima_without_noise() -> None:
    plant = Plant(noise=1e-6)
    runs = planted_runs(planted_spec({"adamw": (0.005, 0.01, 0.02, 0.04, 0.08)}))
    cells = tuned_cells(runs)
    own = by_cell(cells, runs)
    states = rate_states(relabelled(targets_of(plant, runs), cells, own), {cell.key({}): 2.0 for cell in cells}, 0.9)
    for cell in cells:
        known, truth = states[cell.key({})], plant.optimizers["adamw"].optimum(cell.batch)
        assert known.optimum == pytest.approx(truth, rel=1e-4)
        assert known.log_tokens_at(truth) == pytest.approx(plant.optimizers["adamw"].log_tokens(cell.batch), rel=1e-4)
        assert known.is_settled


def test_rate_states_of_no_runs_are_none() -> None:
    assert rate_states(targets_of(Plant(), []), {}, 0.9) == {}


def test_stop_lies_beyond_the_noise_of_the_best_rate() -> None:
    runs = planted_runs(planted_spec({"adamw": (0.01, 0.02, 0.04)}))
    cells = tuned_cells(runs)
    stops = []
    for noise in (0.02, 0.1):
        table = relabelled(targets_of(Plant(noise=noise), runs), cells, by_cell(cells, runs))
        known = rate_states(table, {cell.key({}): 2.0 for cell in cells}, 0.9)[cells[1].key({})]
        assert known.stop_log_tokens is not None
        assert known.log_tokens is not None
        stops.append(known.stop_log_tokens - known.log_tokens)
    assert 0.22 < stops[0] < stops[1] < 1.0  # a quarter more, and the noise
