"""The answer in words: what it claims of tokens, critical batches, trends and frontiers, and what it must not."""

import re
from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page.answer import answers, lead
from tests.report_tables import complete, with_columns
from tests.synthetic import Laboratory, plan, records

LAB = Laboratory(targets=(2.2, 2.1, 2.0))


@pytest.fixture(scope="module")
def estimates():
    return complete(estimate(records(LAB)))


def sentences(estimates):
    return " ".join(sentence for answer in answers(estimates) for sentence in answer.sentences)


@pytest.mark.parametrize(
    ("low", "high", "verdict", "claim"),
    [
        (1.2, 2.0, "ok", "needs fewer tokens"),
        (0.4, 0.8, "ok", "needs more tokens"),
        (0.9, 2.0, "ok", "no difference between"),
        (None, None, "few_points", "not ranked"),
        (1.2, 2.0, "warmup_confounded", "not ranked"),
    ],
)
def test_answer_claims_a_difference_in_tokens_only_where_interval_and_verdict_carry_it(
    low, high, verdict, claim, estimates
):
    changed = with_columns(
        estimates.token_ratios, token_ratio=1.5, token_ratio_low=low, token_ratio_high=high, verdict=verdict
    )
    said = sentences(replace(estimates, token_ratios=changed))
    claims = {"needs fewer tokens", "needs more tokens", "no difference between", "not ranked"}
    assert {other for other in claims if other in said} == {claim}


@pytest.mark.parametrize(
    ("low", "high", "verdict", "claim"),
    [
        (1.2, 2.1, "ok", "is larger than AdamW's: the ratio is 1.61 [1.20, 2.10]."),
        (0.3, 0.8, "ok", "is smaller than AdamW's: the ratio is 1.61 [0.300, 0.800]."),
        (0.9, 2.1, "ok", "No difference between Muon's critical batch and AdamW's is resolved: the ratio is 1.61"),
        (None, None, "few_points", "is not compared with AdamW's: the ratio is 1.61; too few points."),
        (1.2, 2.1, "misfit", "is not compared with AdamW's: the ratio is 1.61 [1.20, 2.10]; the curve misses"),
    ],
)
def test_answer_compares_critical_batches_by_the_interval_of_their_ratio(low, high, verdict, claim, estimates):
    changed = with_columns(estimates.ratio_decomposition, value=1.61, value_low=low, value_high=high, verdict=verdict)
    said = sentences(replace(estimates, ratio_decomposition=changed))
    claims = ("is larger than", "is smaller than", "No difference between Muon's critical", "batch is not compared")
    assert claim in said
    assert sum(other in said for other in claims) == 1


def test_answer_takes_the_token_ratio_apart_in_one_sentence(estimates):
    said = sentences(estimates)
    numbers = "1.51 [1.33, 1.72] at vanishing batch and 2.43 [2.05, 2.90] at infinite batch."
    assert f"The fitted token ratio of AdamW over Muon is {numbers}" in said
    changed = with_columns(estimates.ratio_decomposition, value=None)
    assert "The fitted token ratio" not in sentences(replace(estimates, ratio_decomposition=changed))


@pytest.mark.parametrize(
    ("verdict", "claim"),
    [("rising", "rises"), ("falling", "falls"), ("unresolved", "no trend with the batch is decided")],
)
def test_answer_states_a_trend_by_its_verdict(verdict, claim, estimates):
    said = sentences(
        replace(estimates, ratio_trends=with_columns(estimates.ratio_trends, verdict=verdict, explanation=""))
    )
    assert claim in said
    assert (" rises with" in said, " falls with" in said) == (claim == "rises", claim == "falls")


@pytest.mark.parametrize(
    ("low", "high", "verdict", "claim"),
    [
        (1.3, 2.0, "ok", "By the projected frontiers Muon costs fewer device-seconds than AdamW"),
        (0.5, 0.8, "ok", "By the projected frontiers Muon costs more device-seconds than AdamW"),
        (0.9, 2.0, "ok", "No difference between the projected frontiers of Muon and AdamW is resolved"),
        (1.3, 2.0, "shared_machine", "are not compared: timed on a machine shared with other work."),
    ],
)
def test_answer_ranks_frontiers_only_where_interval_and_verdict_carry_it(low, high, verdict, claim, estimates):
    changed = with_columns(estimates.dominance, cost_ratio_low=low, cost_ratio_high=high, verdict=verdict)
    said = lead(replace(estimates, dominance=changed))
    claims = ("costs fewer", "costs more", "No difference between the projected", "are not compared")
    assert claim in said
    assert sum(other in said for other in claims) == 1


def test_answer_without_points_of_a_pair_compares_no_frontiers(estimates):
    said = lead(replace(estimates, dominance=estimates.dominance.clear()))
    assert "The frontiers of Muon and AdamW cannot be compared, for want of points." in said


LEAD_CLAIMS = {
    "AdamW takes 1.50 times the tokens of Muon",
    "Muon takes 2.00 times the tokens of AdamW",
    "no difference in tokens between Muon and AdamW is resolved",
    "because of a caveat Muon and AdamW are not ranked",
}


@pytest.mark.parametrize(
    ("ratio", "low", "high", "verdict", "claim"),
    [
        (1.5, 1.2, 2.0, "ok", "AdamW takes 1.50 times the tokens of Muon from batch 256 to 16K"),
        (0.5, 0.4, 0.8, "ok", "Muon takes 2.00 times the tokens of AdamW from batch 256 to 16K"),
        (1.5, 0.9, 2.0, "ok", "no difference in tokens between Muon and AdamW is resolved from batch 256 to 16K"),
        (1.5, 1.2, 2.0, "edge_of_grid", "because of a caveat Muon and AdamW are not ranked from batch 256 to 16K"),
    ],
)
def test_lead_claims_no_more_than_the_verdicts(ratio, low, high, verdict, claim, estimates):
    changed = with_columns(
        estimates.token_ratios, token_ratio=ratio, token_ratio_low=low, token_ratio_high=high, verdict=verdict
    )
    said = lead(replace(estimates, token_ratios=changed))
    assert claim in said
    assert sum(other in said for other in LEAD_CLAIMS) == 1


def test_lead_names_the_batches_that_a_claim_leaves_out(estimates):
    sound = with_columns(estimates.token_ratios, token_ratio=1.5, token_ratio_low=1.2, token_ratio_high=2.0)
    caveat = pl.when(pl.col("global_batch_tokens") == 1024).then(pl.lit("edge_of_grid")).otherwise(pl.lit("ok"))
    said = lead(replace(estimates, token_ratios=sound.with_columns(verdict=caveat)))
    assert "times the tokens of Muon at batches 256, 4K and 16K; because of a caveat" in said
    assert "not ranked at batch 1K." in said


def test_lead_gives_both_critical_batches_and_their_caveat(estimates):
    own = pl.col("optimizer") == "adamw"
    changed = estimates.critical_batches.with_columns(
        critical_batch_tokens=2300.0,
        critical_batch_tokens_low=2000.0,
        critical_batch_tokens_high=pl.when(own).then(pl.lit(2600.0)).otherwise(2700.0),
        verdict=pl.when(own).then(pl.lit("edge_of_grid")).otherwise(pl.lit("ok")),
        explanation=pl.when(own).then(pl.lit("")).otherwise(pl.lit("one rate")),
    )
    said = lead(replace(estimates, critical_batches=changed))
    assert "Muon's critical batch is 2.30K [2.00K, 2.70K] tokens against 2.30K [2.00K, 2.60K] tokens for AdamW." in said
    assert "Caveat for AdamW: best learning rate at the edge of those tried." in said
    assert "Reservation for Muon: one rate." in said


def test_lead_of_one_optimizer_gives_its_critical_batch():
    alone = replace(LAB, optimizers={"muon": LAB.optimizers["muon"]})
    said = lead(estimate(records(alone)))
    assert said.startswith("To a validation loss of 2.0 nats per token, Muon's critical batch is ")
    assert "against" not in said


def test_lead_says_how_low_the_loss_came_where_no_target_was_reached():
    made = estimate(records(replace(LAB, targets=(1.1,))))
    assert f"the lowest loss seen was {made.targets['lowest_loss_nats'].min():.3f}." in lead(made)
    assert "(target: 1.1 nats per token)" in lead(made)


@pytest.mark.parametrize("draw", range(4))
def test_sentences_hold_no_identifier(draw):
    runs = [
        replace(run, log_tokens=99.0) if (run.optimizer, run.batch) == ("muon", 256 * 4**draw) else run
        for run in plan(replace(LAB, draw=draw))
    ]
    made = estimate(records(LAB, runs))
    said = f"{lead(made)} {sentences(made)}"
    assert not re.findall(r"\w+_\w+", said)
    assert not re.findall(r"(?<![\d.])\b(?:1 \w+s (?:of|at|behind)|adamw|muon)\b", said)


def test_answer_claims_no_trend_over_ratios_with_caveats(estimates):
    changed = with_columns(estimates.ratio_trends, verdict="rising", explanation="batch 4096: edge_of_grid")
    said = sentences(replace(estimates, ratio_trends=changed))
    assert "no trend with the batch is claimed" in said
    assert " rises with" not in said


def test_answer_tells_the_reservation_beside_a_claim(estimates):
    changed = with_columns(
        estimates.token_ratios, verdict="ok", explanation="muon: one rate", token_ratio_low=1.2, token_ratio_high=1.9
    )
    said = sentences(replace(estimates, token_ratios=changed))
    assert "needs fewer tokens" in said
    assert said.count("; muon: one rate)") == said.count("needs fewer tokens")
