"""What stands against a number: findings by name, the gravest of which is the verdict.

Every table with a `verdict` also has `reasons`, the names of all findings, and `explanation`, the same in words with
the numbers behind them. A finding named `ok` is a reservation: words beside a number that nothing forbids to read.
"""

from collections.abc import Iterable
from typing import NamedTuple

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


class Finding(NamedTuple):
    """One thing that stands against a number, or qualifies it (`ok`), and the words that say so.

    The words hold no semicolon, which joins the words of several findings: so an explanation can be taken apart again.
    """

    name: str
    words: str


def verdict_columns(findings: Iterable[Finding], sound: str = "ok") -> dict[str, str]:
    """Return `verdict`, `reasons` and `explanation` of one row; `sound` is the verdict where no finding forbids it.

    A conclusion (rising, falling) passes as `sound`. The words keep their order, each once.
    """
    findings = [finding for finding in findings if finding.words or finding.name != "ok"]
    names = sorted({finding.name for finding in findings} - {"ok"}, key=GRAVEST_FIRST.index)
    words = dict.fromkeys(finding.words for finding in findings if finding.words)
    return {"verdict": names[0] if names else sound, "reasons": ", ".join(names), "explanation": "; ".join(words)}


def findings_of(reasons: str, words: str) -> list[Finding]:
    """Return the findings of a row's `reasons`, all explained by `words`: how one table hands them on to another."""
    names = reasons.split(", ") if reasons else ["ok"]
    return [Finding(name, words) for name in names]
