from dataclasses import replace

import polars as pl
import pytest
from matplotlib.colors import to_hex

from analysis.estimate import estimate
from analysis.page.forest_figures import critical_batches, ratio_decomposition
from tests.report_tables import BATCHES, TARGETS, complete
from tests.synthetic import Laboratory, records


@pytest.fixture(scope="module")
def whole():
    return complete(estimate(records(Laboratory())))


def marks(ax, marker):
    return [line for line in ax.lines if line.get_marker() == marker]


def words(ax):
    return [text.get_text() for text in ax.texts]


def lines_named(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_forest_has_a_line_for_each_definition_and_errors_of_its_fit(whole):
    assert lines_named(critical_batches(whole).axes[0]) == [
        "emin_over_smin\n(log)",
        "emin_over_smin\n(raw_tokens)",
        "free_exponent",
        "overhead_20pct",
        "token_optimal",
        "token_optimal_5pct",
        "piecewise_kink",
    ]


def test_forest_has_a_panel_for_each_target_and_the_tables_numbers_in_it(whole):
    figure = critical_batches(whole)
    assert len(figure.axes) == len(TARGETS)
    own = whole.critical_batches.filter(pl.col("optimizer") == "muon", pl.col("target_loss_nats") == 2.0)
    drawn = sorted(line.get_xdata()[0] for line in marks(figure.axes[-1], "s"))
    assert drawn == pytest.approx(sorted(own["critical_batch_tokens"].drop_nulls()))


def test_forest_says_in_words_where_a_definition_gives_no_number(whole):
    for ax in critical_batches(whole).axes:
        assert words(ax) == ["AdamW: no number, not bracketed", "Muon: no number, not bracketed"]


def test_forest_draws_an_arrow_where_an_interval_has_no_end(whole):
    ax = critical_batches(whole).axes[0]
    assert len(marks(ax, ">")) == 2
    assert {line.get_xdata()[0] for line in marks(ax, ">")} == {ax.get_xlim()[1]}
    assert not marks(ax, "<")


def test_forest_marks_a_caveat_hollow_and_shades_the_batches_that_were_run(whole):
    ax = critical_batches(whole).axes[0]
    hollow = [line for line in marks(ax, "o") if to_hex(line.get_markerfacecolor()) == "#ffffff"]
    assert [line.get_xdata()[0] for line in hollow] == [3000.0]
    assert any((patch.get_x(), patch.get_width()) == (BATCHES[0], BATCHES[-1] - BATCHES[0]) for patch in ax.patches)


def test_forest_without_any_number_is_words(whole):
    nothing = whole.critical_batches.with_columns(critical_batch_tokens=pl.lit(None, pl.Float64))
    assert critical_batches(replace(whole, critical_batches=nothing)) == (
        "No critical batch is identified by any definition."
    )


def test_decomposition_has_a_line_for_each_part_about_one_and_a_mark_for_each_target(whole):
    ax = ratio_decomposition(whole).axes[0]
    assert len(lines_named(ax)) == 4
    assert any(set(line.get_xdata()) == {1.0} for line in ax.lines)
    assert sorted(line.get_xdata()[0] for line in marks(ax, "o")) == pytest.approx([1.51, 1.61, 1.9, 2.43])
    assert len(marks(ax, "D")) == len(marks(ax, "s")) == 4
