"""The most telling measurement of one parameter."""

import numpy as np

from analysis.statistics.informative import Information, most_informative

#: A line y = a + b x measured at -1, 0 and 1; place 1 is its slope.
JACOBIAN = np.array([[1.0, -1.0], [1.0, 0.0], [1.0, 1.0]])
ONES = np.ones(3)


def test_deviation_is_that_of_least_squares() -> None:
    known = Information.of(JACOBIAN, 4 * ONES, np.zeros(2))
    np.testing.assert_allclose(known.deviation(0), np.sqrt(0.25 / 3))
    np.testing.assert_allclose(known.deviation(1), np.sqrt(0.25 / 2))


def test_gain_is_what_one_measurement_more_takes_off_the_log_deviation() -> None:
    known, precision = Information.of(JACOBIAN, ONES, np.zeros(2)), np.array([1.0, 2.0, 3.0])
    gains = known.gains(JACOBIAN, precision, 1)
    after = [known.added(row, float(weight)).deviation(1) for row, weight in zip(JACOBIAN, precision, strict=True)]
    np.testing.assert_allclose(gains, np.log(known.deviation(1)) - np.log(after))


def test_most_informative_takes_the_ends_of_a_line_in_turn_unless_they_cost_too_much() -> None:
    known = Information.of(JACOBIAN, ONES, np.zeros(2))
    many = np.array([9, 9, 9])
    assert sorted(most_informative(known, JACOBIAN, ONES, ONES, 1, many, 4)) == [0, 0, 2, 2]
    assert most_informative(known, JACOBIAN, ONES, np.array([1.0, 1.0, 50.0]), 1, many, 2) == [0, 0]
    assert most_informative(known, JACOBIAN, ONES, ONES, 1, np.array([1, 0, 0]), 3) == [0]


def test_prior_knows_a_parameter_that_nothing_measures() -> None:
    known = Information.of(np.array([[1.0, 0.0]]), np.array([1.0]), np.array([0.0, 4.0]))
    np.testing.assert_allclose(known.deviation(1), 0.5)
