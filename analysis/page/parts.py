"""Estimates split by model and protocol: no figure, answer or fit mixes two of either."""

import dataclasses
from dataclasses import dataclass

import polars as pl

from analysis.estimate import Estimates
from analysis.schemas import TABLES

#: The protocols in the order of trust: what is read first.
_FIRST_PROTOCOLS = ("constant_ema", "decayed", "branched_decay", "constant_raw", "unstated", "mid_schedule")


@dataclass(frozen=True)
class Part:
    """What belongs to one protocol and, but for scaling laws, to one model.

    `label` tells a part from the others in words; it is empty where there is only one. `model` is empty where a part
    has all models.
    """

    label: str
    model: str
    protocol: str
    estimates: Estimates


def parts(estimates: Estimates) -> list[Part]:
    """Return a part for each model and protocol of which there is a run or an estimate; small models come first."""
    sizes = dict(estimates.records.runs.group_by("model").agg(pl.col("num_params_nonembedding").max()).iter_rows())
    found = _found(estimates, ["model", "protocol"])
    pairs = sorted(found, key=lambda pair: (sizes.get(pair[0]) or 0, pair[0], _trust(pair[1])))
    several_models, several_protocols = (len({pair[place] for pair in pairs}) > 1 for place in (0, 1))
    made = []
    for model, protocol in pairs:
        words = [f"model {model}"] * several_models + [f"protocol {protocol}"] * several_protocols
        own = _only(_only(estimates, "protocol", protocol), "model", model)
        made.append(Part(", ".join(words), model, protocol, own))
    return made


def over_models(estimates: Estimates) -> list[Part]:
    """Return a part for each protocol, all models together: what scaling laws are drawn from."""
    protocols = sorted({name for (name,) in _found(estimates, ["protocol"])}, key=_trust)
    label = "protocol {}" if len(protocols) > 1 else ""
    return [Part(label.format(name), "", name, _only(estimates, "protocol", name)) for name in protocols]


def _trust(protocol: str) -> tuple[int, str]:
    known = protocol in _FIRST_PROTOCOLS
    return (_FIRST_PROTOCOLS.index(protocol) if known else len(_FIRST_PROTOCOLS)), protocol


def _found(estimates: Estimates, columns: list[str]) -> set[tuple[str, ...]]:
    """Return the values of the columns of which there is a row anywhere; a law over all models names none."""
    frames = [estimates.records.runs, *(getattr(estimates, name) for name in TABLES)]
    named = [frame.select(columns).drop_nulls().unique() for frame in frames if set(columns) <= set(frame.columns)]
    return set(pl.concat(named).unique().iter_rows())


def _only(estimates: Estimates, column: str, value: str) -> Estimates:
    """Keep the rows in which the column has the value, in all tables that have the column, and in the records."""
    own = pl.col(column) == value
    frames = {name: getattr(estimates, name).filter(own) for name, columns in TABLES.items() if column in columns}
    records = estimates.records
    runs = records.runs.filter(own)
    evaluations = records.evaluations.join(runs, on="run_id", how="semi", maintain_order="left")
    diagnostics = records.diagnostics.join(runs, on="run_id", how="semi", maintain_order="left")
    records = dataclasses.replace(
        records, runs=runs, evaluations=evaluations, diagnostics=diagnostics, given=records.given.filter(own)
    )
    return dataclasses.replace(estimates, records=records, **frames)
