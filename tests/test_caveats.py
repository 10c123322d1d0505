from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page.caveats import caveats
from tests.report_tables import complete
from tests.synthetic import Laboratory, records


@pytest.fixture(scope="module")
def whole():
    return complete(estimate(records(Laboratory())))


def test_every_explanation_of_every_table_is_among_the_warnings_once(whole):
    made = caveats(whole)
    words = [caveat.explanation for caveat in made]
    for name in ("cells", "critical_batches", "token_ratios", "gaps", "choices", "iso_loss"):
        assert {words for words in getattr(whole, name)["explanation"] if words} <= set(words), name
    assert len({(caveat.verdict, caveat.explanation) for caveat in made}) == len(made)


def test_warnings_say_the_gravest_first_and_reservations_last(whole):
    verdicts = [caveat.verdict for caveat in caveats(whole)]
    assert verdicts.index("not bracketed by what was tried") < verdicts.index("too few points")
    assert verdicts[-1] == "reservation"


def test_a_warning_names_every_table_and_row_that_it_is_about(whole):
    kink = next(caveat for caveat in caveats(whole) if caveat.explanation == "4 batches, 3 parameters")
    assert kink.where == "critical batches: piecewise_kink, AdamW and Muon, targets 2.0, 2.1 and 2.2"


def test_the_same_words_of_two_tables_are_one_warning(whole):
    row = whole.gaps.filter(pl.col("explanation") == "one seed")[:1]
    shared = whole.cells.with_columns(
        verdict=pl.when(pl.col("global_batch_tokens") == 256).then(pl.lit("few_points")).otherwise("verdict"),
        explanation=pl.when(pl.col("global_batch_tokens") == 256).then(pl.lit("one seed")).otherwise("explanation"),
    )
    made = [c for c in caveats(replace(whole, cells=shared, gaps=row)) if c.explanation == "one seed"]
    assert len(made) == 1
    assert "cells: AdamW and Muon, batch 256" in made[0].where
    assert "gaps: AdamW, Muon, batch 256" in made[0].where


def test_a_sound_conclusion_is_no_warning(whole):
    rising = whole.ratio_trends.with_columns(verdict=pl.lit("rising"), explanation=pl.lit(""))
    assert not any("ratio trends" in caveat.where for caveat in caveats(replace(whole, ratio_trends=rising)))


def test_a_law_over_all_losses_names_no_target(whole):
    law = whole.laws.with_columns(target_loss_nats=pl.lit(None, pl.Float64), verdict=pl.lit("few_points"))
    made = next(c for c in caveats(replace(whole, laws=law)) if "laws: " in c.where)
    assert made.where == "laws: emin_over_smin, AdamW and Muon"
