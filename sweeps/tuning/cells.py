"""What is tuned together: the runs of one optimizer at one batch, alike but for what tuning chooses."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import polars as pl

from harness.config import RunConfig
from harness.frozen import dotted
from sweeps.added import shared_settings

#: Values of the axes that are tuned beside the rate, by dotted key.
Setting = Mapping[str, Any]

_WITHIN_A_CELL = ("optimizer.peak_lr", "token_budget", "init_seed", "data_seed")

#: Ratio of neighbouring rates where a grid has one rate only.
_DEFAULT_FACTOR = 2.0


@dataclass(frozen=True)
class TunedCell:
    """One optimizer at one batch: a run of the grid as template, and the grid's rates and seeds there.

    context: the other settings, in words that tell the sweep's contexts apart.
    """

    template: RunConfig
    context: str
    rates: tuple[float, ...]
    seeds: tuple[tuple[int, int], ...]

    @property
    def optimizer(self) -> str:
        return self.template.optimizer.name

    @property
    def batch(self) -> int:
        return self.template.global_batch_tokens

    @cached_property
    def factor(self) -> float:
        """Ratio of neighbouring rates of the grid: the smallest there is."""
        rates = np.array(self.rates)
        return float((rates[1:] / rates[:-1]).min()) if len(rates) > 1 else _DEFAULT_FACTOR

    def key(self, setting: Setting) -> tuple[Any, ...]:
        """Return the cell's key among `rate_states`, at one setting of the axes."""
        return self.context, self.optimizer, self.template.protocol, self.batch, label(setting)

    def run(self, rate: float, seeds: tuple[int, int], setting: Setting, token_budget: int | None = None) -> RunConfig:
        """Return a run of the cell. Raises: ValueError for a setting that no run may have."""
        content = self.template.model_dump(mode="json") | {"init_seed": seeds[0], "data_seed": seeds[1]}
        content["token_budget"] = token_budget or self.template.token_budget
        for key, value in {**setting, "optimizer.peak_lr": rate}.items():
            _put(content, key, value)
        return RunConfig.parse(content, source=f"{self.optimizer}, {label(setting)}")

    def budget_until(self, log_tokens: float | None) -> int | None:
        """Return a budget of whole steps that ends once log T has passed `log_tokens`; None for the sweep's own.

        A schedule that decays depends on its budget, so that a shorter one is another run.
        """
        run = self.template
        if log_tokens is None or run.schedule.kind != "constant":
            return None
        least = run.warmup_effective_tokens / run.schedule.max_warmup_share
        steps = int(np.ceil(max(np.exp(log_tokens), least) / self.batch))
        return min(steps * self.batch, run.token_budget)

    def setting(self, run: RunConfig, axes: Iterable[str]) -> dict[str, Any]:
        """Return the values of the axes that concern this cell."""
        known = dict(_fields(run.model_dump(mode="json")))
        return {key: known[key] for key in axes if key in known}


def tuned_cells(runs: Iterable[RunConfig], axes: Sequence[str] = ()) -> list[TunedCell]:
    """Return the cells of a sweep's own runs."""
    cells: dict[str, list[RunConfig]] = {}
    for run in runs:
        cells.setdefault(_of_cell(run, axes), []).append(run)
    contexts = _contexts([own[0] for own in cells.values()], axes)
    return [
        TunedCell(
            template=max(own, key=lambda run: run.token_budget),
            context=context,
            rates=tuple(sorted({run.optimizer.peak_lr for run in own})),
            seeds=tuple(sorted({(run.init_seed, run.data_seed) for run in own})),
        )
        for own, context in zip(cells.values(), contexts, strict=True)
    ]


def by_cell(cells: Sequence[TunedCell], runs: Iterable[RunConfig], axes: Sequence[str] = ()) -> list[list[RunConfig]]:
    """Return the runs of each cell; runs of none are left out."""
    found: dict[str, list[RunConfig]] = {_of_cell(cell.template, axes): [] for cell in cells}
    for run in runs:
        found.get(_of_cell(run, axes), []).append(run)
    return list(found.values())


def relabelled(
    targets: pl.DataFrame, cells: Sequence[TunedCell], runs: Sequence[Sequence[RunConfig]], axes: Sequence[str] = ()
) -> pl.DataFrame:
    """Return the rows of `targets` of the cells' runs, named as `TunedCell.key` does: model, optimizer, tuning."""
    names = [
        (run.run_id, cell.context, cell.optimizer, label(cell.setting(run, axes)))
        for cell, own in zip(cells, runs, strict=True)
        for run in own
    ]
    columns = ("run_id", "model", "optimizer", "tuning")
    named = pl.DataFrame(names, schema=dict.fromkeys(columns, pl.String), orient="row")
    return targets.drop(columns[1:]).join(named, on="run_id").select(targets.columns)


def fresh_seeds(used: Iterable[tuple[int, int]], reserved: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield seeds that are neither used nor reserved, the smallest first."""
    taken = {seed for pair in used for seed in pair} | set(reserved)
    return ((seed, seed) for seed in count() if seed not in taken)


def label(setting: Setting) -> str:
    """Write `weight_decay=0.1, momentum=0.9`."""
    return ", ".join(f"{key.rpartition('.')[2]}={json.dumps(value)}" for key, value in setting.items())


def _of_cell(run: RunConfig, axes: Sequence[str]) -> str:
    return shared_settings(run, axes, _WITHIN_A_CELL)


def _contexts(runs: Sequence[RunConfig], axes: Sequence[str]) -> list[str]:
    """Name what the runs do not share beside optimizer and batch: the model, and the settings that differ."""
    keys = ("optimizer", "global_batch_tokens", *_WITHIN_A_CELL)
    settings = [dict(dotted(json.loads(shared_settings(run, axes, keys)))) for run in runs]
    differ = [key for key in settings[0] if len({json.dumps(own.get(key)) for own in settings}) > 1] if settings else []
    if len({run.model_name for run in runs}) == len({run.model for run in runs}):
        differ = [key for key in differ if not key.startswith("model.")]
    return [
        ", ".join([run.model_name, *(f"{key}={own.get(key)}" for key in differ)])
        for run, own in zip(runs, settings, strict=True)
    ]


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content[section]
    content[last] = value


def _fields(content: Setting, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every field by its dotted key, sections and what is in them."""
    for key, value in content.items():
        yield f"{above}{key}", value
        if isinstance(value, Mapping):
            yield from _fields(value, f"{above}{key}.")
