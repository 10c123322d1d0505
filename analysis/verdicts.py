"""What stands against a number: findings by name, the gravest of which is the verdict.

Every table with a `verdict` also has `reasons`, the names of all findings, joined by ", ", and `explanation`, the words
of each in the same order, with the numbers behind them, joined by "; ": so a row gives its findings back exactly. One
named `ok` is a reservation: words beside a number that nothing forbids to read.
"""

from collections.abc import Iterable
from typing import NamedTuple

from analysis.format import verdict

#: All verdicts that stand against a number, the gravest first.
GRAVEST_FIRST = (
    "refused",
    "diverged",
    "not_reached",
    "reached_at_first_eval",
    "not_identified",
    "non_monotone",
    "misfit",
    "mid_schedule",
    "warmup_confounded",
    "censored",
    "edge_of_grid",
    "shared_machine",
    "few_points",
    "single_rate",
)

_NAMES, _WORDS = ", ", "; "


class Finding(NamedTuple):
    """One thing that stands against a number, or qualifies it (`ok`), and the words that say so."""

    name: str
    words: str


def verdict_columns(findings: Iterable[Finding], sound: str = "ok") -> dict[str, str]:
    """Return `verdict`, `reasons` and `explanation` of one row; `sound` is the verdict where no finding forbids it.

    A conclusion (rising, falling) passes as `sound`. Findings stand the gravest first, each once, reservations last:
    `reasons` has their names and `explanation` their words, one for one, as `findings_of` reads them back.
    """
    said = dict.fromkeys(_in_full(finding) for finding in findings if finding != Finding("ok", ""))
    ordered = sorted(said, key=lambda finding: gravity(finding.name))
    names = [finding.name for finding in ordered]
    return {
        "verdict": sound if not names or names[0] == "ok" else names[0],
        "reasons": _NAMES.join(names),
        "explanation": _WORDS.join(finding.words for finding in ordered),
    }


def findings_of(reasons: str, explanation: str) -> list[Finding]:
    """Return the findings of a row, the inverse of `verdict_columns`: how one table hands them on to another."""
    if not reasons:
        return []
    return [Finding(*pair) for pair in zip(reasons.split(_NAMES), explanation.split(_WORDS), strict=True)]


def names_of(reasons: str) -> list[str]:
    """Return the names of what stands against a row's number, each once; reservations are none."""
    return [name for name in dict.fromkeys(reasons.split(_NAMES)) if name not in ("", "ok")]


def gravity(name: str) -> int:
    """Return the place of a verdict in the order of gravity; reservations and conclusions come last."""
    return GRAVEST_FIRST.index(name) if name in GRAVEST_FIRST else len(GRAVEST_FIRST)


def _in_full(finding: Finding) -> Finding:
    """Give every finding words of its own, without what joins the words of several."""
    return Finding(finding.name, (finding.words or verdict(finding.name)).replace(_WORDS, ", "))
