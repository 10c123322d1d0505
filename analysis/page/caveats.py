"""Every warning of the tables in one list: what stands against which numbers, the gravest first, each said once.

An explanation joins the words of several findings with semicolons (`verdicts.verdict_columns`), in tables of pairs
after the name of the optimizer that they are about. Here every finding stands alone, without that name, and those that
differ in a decimal number alone are one.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.schemas import TABLES
from analysis.verdicts import GRAVEST_FIRST

#: Conclusions and sound numbers: a warning only with words beside them.
_SOUND = ("ok", "rising", "falling", "unresolved")
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
    "kind": "",
}
_MAX_VALUES = 6
#: Numbers that may differ between findings that are otherwise the same: p-values, shares, losses, rates.
_DECIMAL = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+")


class Caveat(NamedTuple):
    """What stands against numbers: a verdict, its explanation, and the tables and rows that it is about."""

    verdict: str
    explanation: str
    where: str

    @property
    def title(self) -> str:
        """Return the verdict in words; one that is `ok` is a reservation."""
        return "reservation" if self.verdict == "ok" else fmt.verdict(self.verdict)


@dataclass
class _Said:
    """Findings that are alike: their words, the verdicts that they may stand for, the rows by the name of the table.

    `beside` are the findings that stand in the same rows.
    """

    names: set[str]
    words: dict[str, None] = field(default_factory=dict)
    rows: dict[str, list[pl.DataFrame]] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)


def caveats(estimates: Estimates) -> list[Caveat]:
    """Return the warnings of all tables of one model and protocol, the gravest first."""
    return caveats_of({name: getattr(estimates, name) for name, columns in TABLES.items() if "verdict" in columns})


def caveats_of(tables: Mapping[str, pl.DataFrame]) -> list[Caveat]:
    """Return the warnings of tables by their names, the gravest first."""
    ordered = sorted(_found(tables), key=lambda said: _gravity(_verdict(said)))
    return [Caveat(_verdict(said), _worded(list(said.words)), _where(said)) for said in ordered]


def _found(tables: Mapping[str, pl.DataFrame]) -> list[_Said]:
    """Take all explanations apart into findings, each once."""
    owner, found = _owner(tables.values()), dict[str, _Said]()
    for name, frame in tables.items():
        warned = frame.filter(~pl.col("verdict").is_in(_SOUND) | (pl.col("explanation") != ""))
        for key, rows in warned.group_by("verdict", "reasons", "explanation", maintain_order=True):
            verdict, reasons, explanation = map(str, key)
            words = [owner.sub("", part) for part in (explanation or fmt.verdict(verdict)).split("; ")]
            alike = [_DECIMAL.sub("…", part) for part in words]
            names = set(filter(None, reasons.split(", ")))
            for template, part in zip(alike, words, strict=True):
                own = names & {"few_points"} if part.startswith("no interval") else names
                said = found.setdefault(template, _Said(own))
                said.names = said.names & own
                said.words[part] = None
                said.rows.setdefault(name.replace("_", " "), []).append(rows)
                said.beside |= set(alike)
    _narrow(found)
    return list(found.values())


def _owner(frames: Iterable[pl.DataFrame]) -> re.Pattern[str]:
    """Match the optimizer, perhaps with batches, that words begin with."""
    columns = ("optimizer", "baseline", "challenger")
    named = (frame[column].drop_nulls() for frame in frames for column in columns if column in frame.columns)
    written = {re.escape(fmt.optimizer_name(name)) for names in named for name in names.unique()}
    return re.compile(rf"^(?:{'|'.join(sorted(written))})(?:, batch(?:es)? [^:]+)?: ")


def _verdict(said: _Said) -> str:
    """Return the verdict that a finding stands for, `ok` where its rows have none in common."""
    return min(said.names, key=_gravity, default="ok")


def _narrow(found: Mapping[str, _Said]) -> None:
    """Of several verdicts that a finding may stand for, leave out those that others in the same rows stand for."""
    for _ in GRAVEST_FIRST:
        for said in found.values():
            others = [found[key].names for key in said.beside]
            taken = {name for names in others if len(names) == 1 for name in names}
            said.names = said.names - taken or said.names


def _worded(words: list[str]) -> str:
    """Write findings that are alike as one: a number that differs as a range; several that do as an ellipsis each."""
    numbers = list(zip(*map(_DECIMAL.findall, words), strict=True))
    spans = [sorted(set(own), key=float) for own in numbers]
    several = sum(len(span) > 1 for span in spans) > 1
    written = iter([span[0] if len(span) == 1 else "…" if several else f"{span[0]} to {span[-1]}" for span in spans])
    return _DECIMAL.sub(lambda _: next(written), words[0])


def _where(said: _Said) -> str:
    return "; ".join(f"{table}: {_place(pl.concat(rows))}" for table, rows in said.rows.items())


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


def _gravity(verdict: str) -> int:
    return GRAVEST_FIRST.index(verdict) if verdict in GRAVEST_FIRST else len(GRAVEST_FIRST)
