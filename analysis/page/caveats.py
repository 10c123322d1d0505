"""Every warning of the tables in one list: what stands against which numbers, the gravest first, each said once."""

from collections.abc import Iterator
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


class Caveat(NamedTuple):
    """What stands against numbers: a verdict, its explanation, and the tables and rows that it is about."""

    verdict: str
    explanation: str
    where: str


def caveats(estimates: Estimates) -> list[Caveat]:
    """Return the warnings of all tables of one model and protocol, the gravest first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, columns in TABLES.items():
        if "verdict" in columns:
            for verdict, explanation, where in _of_table(getattr(estimates, name)):
                found.setdefault((verdict, explanation), []).append(f"{name.replace('_', ' ')}: {where}")
    ordered = sorted(found, key=lambda key: _gravity(key[0]))
    return [Caveat(_title(verdict), words, "; ".join(found[verdict, words])) for verdict, words in ordered]


def _of_table(frame: pl.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Yield verdict, explanation and place of each warning of a table, rows that share the first two together."""
    warned = frame.filter(~pl.col("verdict").is_in(_SOUND) | (pl.col("explanation") != ""))
    for (verdict, explanation), rows in warned.group_by("verdict", "explanation", maintain_order=True):
        yield str(verdict), str(explanation), _where(rows)


def _where(rows: pl.DataFrame) -> str:
    places = [_values(rows, name, noun) for name, noun in _PLACES.items() if name in rows.columns]
    return ", ".join(filter(None, places))


def _values(rows: pl.DataFrame, name: str, noun: str) -> str:
    """Write the values of a column, the first few of them; a law over all losses names none."""
    write = fmt.column_writer(name)
    values = [write(value) for value in rows[name].drop_nulls().unique().sort()]
    if not values:
        return ""
    if len(values) > _MAX_VALUES:
        values = [*values[: _MAX_VALUES - 1], f"{len(values) - _MAX_VALUES + 1} more"]
    plural = {"batch": "batches"}.get(noun, f"{noun}s") if len(values) > 1 else noun
    return " ".join(filter(None, (plural if noun else "", fmt.listed(values))))


def _gravity(verdict: str) -> int:
    return GRAVEST_FIRST.index(verdict) if verdict in GRAVEST_FIRST else len(GRAVEST_FIRST)


def _title(verdict: str) -> str:
    return "reservation" if verdict in _SOUND else fmt.verdict(verdict)
