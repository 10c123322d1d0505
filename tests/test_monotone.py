"""The monotone cubic against scipy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from analysis.statistics.monotone import where_reached

RISES = st.one_of(st.just(0.0), st.floats(1e-6, 2.0))
STEPS = st.lists(st.tuples(st.floats(0.1, 3.0), RISES), min_size=1, max_size=6)


@given(STEPS, st.floats(0.0, 1.0))
def test_where_reached_is_where_the_cubic_of_scipy_has_the_value(
    steps: list[tuple[float, float]], share: float
) -> None:
    x = np.cumsum([0.0, *(width for width, _ in steps)])
    y = np.cumsum([0.0, *(rise for _, rise in steps)])
    value = share * y[-1]
    assert PchipInterpolator(x, y)(where_reached(x, y, value)) == pytest.approx(value, abs=1e-9)


def test_where_reached_is_the_end_of_a_flat_part() -> None:
    x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 1.0, 2.0])
    assert where_reached(x, y, 1.0) == pytest.approx(2.0)
    assert where_reached(x, y, 2.0) == 3.0
