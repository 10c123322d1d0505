"""Findings as columns of a row, and back."""

import pytest

from analysis.verdicts import GRAVEST_FIRST, Finding, findings_of, names_of, verdict_columns

FALLS_SHORT, NEAR_WARMUP = Finding("censored", "1 of 3 fell short"), Finding("warmup_confounded", "after 2 warmups")
RESERVED = Finding("ok", "reference batch 256")


@pytest.mark.parametrize("findings", [[], [RESERVED], [RESERVED, FALLS_SHORT, NEAR_WARMUP], [FALLS_SHORT] * 2])
def test_findings_come_back_from_the_columns_the_gravest_first(findings: list[Finding]) -> None:
    columns = verdict_columns(findings)
    order = [NEAR_WARMUP, FALLS_SHORT, RESERVED]
    assert findings_of(columns["reasons"], columns["explanation"]) == [own for own in order if own in findings]


def test_words_under_two_names_stand_twice_and_names_once() -> None:
    columns = verdict_columns([Finding("censored", "so it is"), Finding("diverged", "so it is"), FALLS_SHORT])
    assert columns["reasons"] == "diverged, censored, censored"
    assert columns["explanation"] == "so it is; so it is; 1 of 3 fell short"
    assert names_of(columns["reasons"]) == ["diverged", "censored"]


def test_verdict_is_the_gravest_and_reservations_forbid_no_conclusion() -> None:
    assert verdict_columns([RESERVED, FALLS_SHORT], sound="rising")["verdict"] == "censored"
    assert verdict_columns([RESERVED], sound="rising") | {"explanation": ""} == {
        "verdict": "rising",
        "reasons": "ok",
        "explanation": "",
    }
    assert verdict_columns([Finding("ok", "")]) == {"verdict": "ok", "reasons": "", "explanation": ""}


@pytest.mark.parametrize("name", GRAVEST_FIRST)
def test_a_finding_without_words_is_said_by_its_name(name: str) -> None:
    columns = verdict_columns([Finding(name, "")])
    (found,) = findings_of(columns["reasons"], columns["explanation"])
    assert found.name == name
    assert found.words


def test_words_cannot_take_a_row_apart_wrongly() -> None:
    columns = verdict_columns([Finding("censored", "momentum; rate"), NEAR_WARMUP])
    assert len(findings_of(columns["reasons"], columns["explanation"])) == 2
