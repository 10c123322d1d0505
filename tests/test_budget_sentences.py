from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page.budget_sentences import budget_sentences
from tests.report_tables import complete, without
from tests.synthetic import Laboratory, records


@pytest.fixture(scope="module")
def whole():
    return complete(estimate(records(Laboratory())))


def test_sentences_are_about_the_largest_budget_and_rank_only_where_a_verdict_and_a_test_allow(whole):
    first, *_ = budget_sentences(whole)
    assert first == (
        "After 400K tokens Muon's loss is lower than AdamW's by 0.020 to 0.120 nats/token from batch 1K to 16K; "
        "because of a caveat Muon and AdamW are not ranked by loss at batch 256."
    )


def test_a_gap_beyond_the_p_value_of_the_level_is_not_resolved(whole):
    weak = whole.gaps.with_columns(p_value_holm=pl.lit(0.3), verdict=pl.lit("ok"))
    first, *_ = budget_sentences(replace(whole, gaps=weak))
    assert first == "After 400K tokens no difference in loss between Muon and AdamW is resolved from batch 256 to 16K."


def test_a_batch_beyond_the_grid_is_a_bound_and_not_a_number(whole):
    said = next(sentence for sentence in budget_sentences(whole) if "may use a batch" in sentence)
    assert said.endswith("2.10 [1.50, 2.90] times at 256, 2.60 [1.90, 3.80] times at 1K, more than 4 times at 4K.")


def test_speedup_without_a_number_gives_its_reason(whole):
    refused = without(whole.speedups, "token_ratio").with_columns(
        verdict=pl.lit("refused"), explanation=pl.lit("one budget")
    )
    assert "is not told: one budget." in budget_sentences(replace(whole, speedups=refused))[-1]
    assert "needs, by its loss law, 1.40 [1.20, 1.70] times the tokens." in budget_sentences(whole)[-1]


def test_without_tables_of_equal_budgets_nothing_is_said(whole):
    empty = {name: getattr(whole, name).clear() for name in ("gaps", "iso_loss", "speedups")}
    assert budget_sentences(replace(whole, **empty)) == []
