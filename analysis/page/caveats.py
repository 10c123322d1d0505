"""Every warning of the tables in one list: what stands against which numbers, the gravest first, each said once.

A row's findings (`verdicts.findings_of`) stand alone here. What a table of pairs has from the cells of one side bears
the name of its optimizer: without it, it is the same warning as that of the cells. Findings of one name that differ in
decimal numbers alone are one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.schemas import TABLES
from analysis.verdicts import Finding, findings_of, gravity

#: The columns that say where a row stands, in the order of reading, and the noun before several of their values.
_PLACES = {
    "definition": "",
    "quantity": "",
    "rule": "",
    "baseline": "",
    "challenger": "",
    "optimizer": "",
    "global_batch_tokens": "batch",
    "target_loss_nats": "target",
    "token_budget": "budget",
    "branch_tokens": "branch point",
    "kind": "",
}
_MAX_VALUES = 6
_SIDES = ("baseline", "challenger")
#: Numbers that may differ between findings that are otherwise the same: p-values, shares, losses, rates.
_DECIMAL = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")


class Caveat(NamedTuple):
    """What stands against numbers: a verdict, its explanation, and the tables and rows that it is about."""

    verdict: str
    explanation: str
    places: tuple[str, ...]

    @property
    def where(self) -> str:
        """Return all tables and rows in one line."""
        return "; ".join(self.places)

    @property
    def title(self) -> str:
        """Return the verdict in words; one that is `ok` is a reservation."""
        return "reservation" if self.verdict == "ok" else fmt.verdict(self.verdict)


@dataclass
class _Said:
    """Findings of one name that are alike: their words, and the rows by the name of the table."""

    words: dict[str, None] = field(default_factory=dict)
    rows: dict[str, list[pl.DataFrame]] = field(default_factory=dict)


def caveats(estimates: Estimates) -> list[Caveat]:
    """Return the warnings of all tables of one model and protocol, the gravest first."""
    return caveats_of({name: getattr(estimates, name) for name, columns in TABLES.items() if "verdict" in columns})


def caveats_of(tables: Mapping[str, pl.DataFrame]) -> list[Caveat]:
    """Return the warnings of tables by their names, the gravest first."""
    found: dict[Finding, _Said] = {}
    for name, frame in tables.items():
        for finding, rows in _findings(frame):
            alike = Finding(finding.name, _DECIMAL.sub("…", finding.words))
            said = found.setdefault(alike, _Said())
            said.words[finding.words] = None
            said.rows.setdefault(name.replace("_", " "), []).append(rows)
    ordered = sorted(found.items(), key=lambda each: gravity(each[0].name))
    return [Caveat(alike.name, _worded(list(said.words)), _places(said)) for alike, said in ordered]


def _findings(frame: pl.DataFrame) -> Iterator[tuple[Finding, pl.DataFrame]]:
    """Yield every finding of a table with the rows that have it."""
    sides = [name for name in _SIDES if name in frame.columns]
    warned = frame.filter(pl.col("reasons") != "")
    for (reasons, explanation, *names), rows in warned.group_by("reasons", "explanation", *sides, maintain_order=True):
        owners = [f"{fmt.optimizer_name(str(name))}: " for name in names]
        for finding in dict.fromkeys(
            Finding(name, _without(owners, words)) for name, words in findings_of(str(reasons), str(explanation))
        ):
            yield finding, rows


def _without(owners: list[str], words: str) -> str:
    """Leave out the optimizer that words are about."""
    return next((words.removeprefix(owner) for owner in owners if words.startswith(owner)), words)


def _worded(words: list[str]) -> str:
    """Write findings that are alike as one: a number that differs as a range; several that do as an ellipsis each."""
    numbers = list(zip(*map(_DECIMAL.findall, words), strict=True))
    spans = [sorted(set(own), key=float) for own in numbers]
    several = sum(len(span) > 1 for span in spans) > 1
    written = iter([span[0] if len(span) == 1 else "…" if several else f"{span[0]} to {span[-1]}" for span in spans])
    return _DECIMAL.sub(lambda _: next(written), words[0])


def _places(said: _Said) -> tuple[str, ...]:
    return tuple(f"{table}: {_place(pl.concat(rows))}" for table, rows in said.rows.items())


def _place(rows: pl.DataFrame) -> str:
    places = [_values(rows, name, noun) for name, noun in _PLACES.items() if name in rows.columns]
    return ", ".join(filter(None, places))


def _values(rows: pl.DataFrame, name: str, noun: str) -> str:
    """Write the values of a column, the first few of them; a law over all losses names none."""
    write = fmt.column_writer(name)
    values = [write(value) for value in rows[name].drop_nulls().unique().sort()]
    if not values:
        return ""
    plural = {"batch": "batches"}.get(noun, f"{noun}s") if len(values) > 1 else noun
    return " ".join(filter(None, (plural if noun else "", fmt.listed(fmt.first(values, _MAX_VALUES)))))
