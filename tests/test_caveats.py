from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page.caveats import caveats, caveats_of
from tests.report_tables import complete
from tests.synthetic import Laboratory, records


@pytest.fixture(scope="module")
def whole():
    return complete(estimate(records(Laboratory())))


def test_every_finding_of_every_table_is_among_the_warnings_once(whole):
    made = caveats(whole)
    words = [caveat.explanation for caveat in made]
    for name in ("cells", "critical_batches", "gaps", "choices", "iso_loss"):
        told = getattr(whole, name)["explanation"].str.split("; ").explode()
        assert {part for part in told if part and "." not in part} <= set(words), name
    assert len({(caveat.verdict, caveat.explanation) for caveat in made}) == len(made)


def explained(whole, *told):
    """Return the warnings of a table of ratios whose rows have these reasons and explanations."""
    reasons, explanations = zip(*told, strict=True)
    rows = whole.token_ratios[: len(told)].with_columns(
        verdict=pl.Series([names.split(", ")[0] or "ok" for names in reasons]),
        reasons=pl.Series(reasons),
        explanation=pl.Series(explanations),
    )
    return [(caveat.verdict, caveat.explanation) for caveat in caveats_of({"token_ratios": rows})]


def test_words_that_differ_in_the_optimizer_or_one_decimal_are_one_warning(whole):
    made = explained(
        whole,
        ("misfit, misfit", "AdamW: the curve misses (p = 1.6e-05); Muon: the curve misses (p = 0.0024)"),
        ("misfit", "Muon: the curve misses (p = 0.03)"),
        (
            "edge_of_grid, edge_of_grid",
            "AdamW: rate 0.01 lies outside 0.02 to 0.08; Muon: rate 0.3 lies outside 0.02 to 0.1",
        ),
    )
    assert made == [
        ("misfit", "the curve misses (p = 1.6e-05 to 0.03)"),
        ("edge_of_grid", "rate … lies outside 0.02 to …"),
    ]


def test_a_finding_stands_under_its_own_verdict_not_the_gravest_of_its_rows(whole):
    made = explained(
        whole,
        ("misfit, warmup_confounded, few_points, ok", "misses; near warmup; no interval: 4 batches; reference 256"),
        ("warmup_confounded, few_points", "near warmup; no interval: 4 batches"),
        ("ok", "reference 256"),
    )
    assert made == [
        ("misfit", "misses"),
        ("warmup_confounded", "near warmup"),
        ("few_points", "no interval: 4 batches"),
        ("ok", "reference 256"),
    ]


def test_the_same_words_under_two_verdicts_are_two_warnings(whole):
    made = explained(whole, ("censored", "three of them"), ("diverged", "three of them"))
    assert made == [("diverged", "three of them"), ("censored", "three of them")]


def test_warnings_say_the_gravest_first_and_reservations_last(whole):
    verdicts = [caveat.verdict for caveat in caveats(whole)]
    assert verdicts.index("not_identified") < verdicts.index("few_points")
    assert verdicts[-1] == "ok"


def test_a_warning_names_every_table_and_row_that_it_is_about(whole):
    kink = next(caveat for caveat in caveats(whole) if caveat.explanation == "4 batches, 3 parameters")
    assert kink.where == "critical batches: piecewise_kink, AdamW and Muon, targets 2.0, 2.1 and 2.2"


def test_the_same_words_of_two_tables_are_one_warning(whole):
    row = whole.gaps.filter(pl.col("explanation") == "one seed")[:1]
    shared = whole.cells.with_columns(
        verdict=pl.when(pl.col("global_batch_tokens") == 256).then(pl.lit("few_points")).otherwise("verdict"),
        reasons=pl.when(pl.col("global_batch_tokens") == 256).then(pl.lit("few_points")).otherwise("reasons"),
        explanation=pl.when(pl.col("global_batch_tokens") == 256).then(pl.lit("one seed")).otherwise("explanation"),
    )
    made = [c for c in caveats(replace(whole, cells=shared, gaps=row)) if c.explanation == "one seed"]
    assert len(made) == 1
    assert "cells: AdamW and Muon, batch 256" in made[0].where
    assert "gaps: AdamW, Muon, batch 256" in made[0].where


def test_a_sound_conclusion_is_no_warning(whole):
    rising = whole.ratio_trends.with_columns(verdict=pl.lit("rising"), reasons=pl.lit(""), explanation=pl.lit(""))
    assert not any("ratio trends" in caveat.where for caveat in caveats(replace(whole, ratio_trends=rising)))


def test_a_law_over_all_losses_names_no_target(whole):
    words = {name: pl.lit("few_points") for name in ("verdict", "reasons", "explanation")}
    law = whole.laws.with_columns(target_loss_nats=pl.lit(None, pl.Float64), **words)
    made = next(c for c in caveats(replace(whole, laws=law)) if "laws: " in c.where)
    assert made.where == "laws: emin_over_smin, AdamW and Muon"
