"""Coverage, gaps and laws: what their panels hold."""

from dataclasses import replace

import polars as pl
import pytest
from matplotlib.colors import to_hex

from analysis.estimate import estimate
from analysis.page.budget_figures import equal_budget, gaps
from analysis.page.coverage_figure import coverage
from analysis.page.laws_figure import laws
from analysis.page.tokens_figures import steps_to_target, tokens_to_target
from tests.report_tables import BUDGETS, complete, without
from tests.synthetic import Laboratory, plan, records

LAB = Laboratory()


@pytest.fixture(scope="module")
def whole():
    return complete(estimate(records(LAB)))


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def legend(figure):
    return {text.get_text() for side in figure.legends for text in side.get_texts()}


def test_coverage_counts_runs_at_the_target_and_seeds_in_every_tile(whole):
    figure = coverage(whole)
    assert texts(figure) == ["7 of 7\n3 seeds"] * 8
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["AdamW", "Muon"]
    assert legend(figure) == {"all reached it"}


def test_coverage_says_which_cells_fell_short_diverged_or_are_absent():
    runs = [run for run in plan(LAB) if (run.optimizer, run.batch) != ("muon", 256)]
    short = {("adamw", 1024): 99.0, ("adamw", 4096): None}
    runs = [replace(run, log_tokens=short.get((run.optimizer, run.batch)) or run.log_tokens) for run in runs]
    first = next(place for place, run in enumerate(runs) if (run.optimizer, run.batch) == ("adamw", 4096))
    runs[first] = replace(runs[first], log_tokens=99.0)
    figure = coverage(estimate(records(LAB, runs)))
    said = texts(figure)
    assert said.count("–") == 1
    assert said.count("0 of 7\n3 seeds") == 1
    assert said.count("6 of 7\n3 seeds") == 1
    assert legend(figure) == {"all reached it", "some fell short", "none reached it"}


def test_coverage_of_a_table_without_targets_counts_runs(whole):
    finals = replace(whole, targets=whole.targets.clear(), cells=whole.cells.clear())
    figure = coverage(finals)
    assert texts(figure) == ["7 runs\n3 seeds"] * 8
    assert legend(figure) == {"all finished"}


def test_coverage_of_targets_that_a_law_gives_counts_runs(whole):
    figure = coverage(replace(whole, targets=whole.targets.clear()))
    assert figure.axes[0].get_title(loc="left") == "Runs"
    assert legend(figure) == {"all finished"}


def test_figures_of_tokens_that_are_refused_say_why_in_words(whole):
    words = {"verdict": pl.lit("refused"), "explanation": pl.lit("one token budget, 512K, identifies none")}
    refused = replace(whole, cells=whole.cells.with_columns(**words, tokens_to_target=pl.lit(None, pl.Float64)))
    assert tokens_to_target(refused) == steps_to_target(refused) == "One token budget, 512K, identifies none."
    short = whole.cells.with_columns(tokens_to_target=pl.lit(None, pl.Float64), verdict=pl.lit("not_reached"))
    assert not isinstance(tokens_to_target(replace(whole, cells=short)), str)


def test_gaps_have_a_line_at_equal_loss_and_a_panel_for_each_budget(whole):
    figure = gaps(whole)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["after 100K tokens", "after 400K tokens"]
    for ax, budget in zip(figure.axes, BUDGETS, strict=True):
        assert any(set(line.get_ydata()) == {0.0} for line in ax.lines)
        drawn = [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "s"]
        assert drawn == pytest.approx(whole.gaps.filter(pl.col("token_budget") == budget)["gap_nats"].to_list())
        hollow = [line for line in ax.lines if to_hex(line.get_markerfacecolor()) == "#ffffff"]
        assert [line.get_ydata()[0] for line in hollow] == pytest.approx([-0.03])


def test_gaps_that_are_not_identified_are_words(whole):
    assert "No gaps" in gaps(replace(whole, gaps=without(whole.gaps, "gap_nats")))


def test_law_goes_through_its_prefactor_and_exponent_between_its_points(whole):
    ax = laws(whole).axes[0]
    line = next(line for line in ax.lines if list(line.get_xdata()) == [2.0, 2.2])
    assert list(line.get_ydata()) == pytest.approx([8000 * 2.0**-2, 8000 * 2.2**-2])
    assert ax.get_xlabel() == "Target loss (nats/token)"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_law_over_parameters_takes_its_points_from_all_models(whole):
    sizes = {"small": 10**6, "large": 10**7}
    rows = whole.critical_batches.filter(pl.col("target_loss_nats") == 2.0)
    runs = [
        whole.records.runs.with_columns(model=pl.lit(m), num_params_nonembedding=pl.lit(n)) for m, n in sizes.items()
    ]
    law = whole.laws.with_columns(
        model=pl.lit(None, pl.String), by=pl.lit("num_params_nonembedding"), term=pl.lit("num_params_nonembedding")
    )
    made = replace(
        whole,
        laws=law,
        critical_batches=pl.concat([rows.with_columns(model=pl.lit(model)) for model in sizes]),
        records=replace(whole.records, runs=pl.concat(runs)),
    )
    ax = laws(made).axes[0]
    assert {line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"} == set(sizes.values())


def test_a_law_of_several_variables_alone_is_words(whole):
    joint = whole.laws.with_columns(by=pl.lit("num_params_nonembedding, tokens_to_target"))
    assert "No scaling law" in laws(replace(whole, laws=joint))


def test_equal_tokens_on_the_way_of_a_run_are_labelled_intermediate(whole):
    def titles(mark):
        marked = whole.equal_budget.with_columns(mark=pl.lit(mark))
        return [ax.get_title(loc="left") for ax in equal_budget(replace(whole, equal_budget=marked)).axes]

    assert all(title.endswith("tokens") for title in titles("final"))
    assert all(title.endswith("tokens, an intermediate mark") for title in titles("intermediate"))
