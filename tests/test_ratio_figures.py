from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page.ratio_figures import rate_rules, token_ratio_by_target
from tests.report_tables import BATCHES, complete
from tests.synthetic import Laboratory, records


@pytest.fixture(scope="module")
def whole():
    return complete(estimate(records(Laboratory())))


def test_ratio_over_the_target_has_harder_targets_to_the_right_and_the_tables_numbers(whole):
    ax = token_ratio_by_target(whole).axes[0]
    left, right = ax.get_xlim()
    assert left > 2.2
    assert right < 2.0
    drawn = sorted(line.get_ydata()[0] for line in ax.lines if line.get_marker() != "None")
    assert drawn == pytest.approx(sorted(whole.token_ratios["token_ratio"].drop_nulls()))


def test_ratio_over_one_target_is_words(whole):
    single = whole.token_ratios.filter(pl.col("target_loss_nats") == 2.0)
    assert "two targets or more" in token_ratio_by_target(replace(whole, token_ratios=single))


def test_rules_are_drawn_to_the_headline_target_a_line_for_each(whole):
    figure = rate_rules(whole)
    (ax,) = figure.axes
    lines = [line for line in ax.lines if len(line.get_xdata()) == len(BATCHES)]
    tuned, square_root, fixed = ([line.get_ydata()[-1] for line in lines][place] for place in (0, 1, 2))
    assert (tuned, square_root, fixed) == pytest.approx((1.5 * 1.1**3, 1.5 * 1.05**3, 1.5 * 0.8**3))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == [
        "each batch at its\nbest rate",
        "rate ∝ √batch",
        "one rate",
    ]
