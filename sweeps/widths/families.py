"""The runs of a sweep as families: one optimizer, many widths, the same hyperparameters to be tuned at each."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.statistics.telescoping import Grid, check_doubling
from harness.config import RunConfig
from harness.frozen import dotted

RATE = "optimizer.peak_lr"

#: What changes with the width.
_SHAPE = ("preset", "width", "heads", "kv_heads", "mlp_width")
_SEEDS = ("init_seed", "data_seed")

#: Neighbouring ratios of an axis may differ by this share, so that rounded values are equally spaced.
_UNEVEN = 0.02


@dataclass(frozen=True)
class Family:
    """Runs that differ in width, seeds and hyperparameters.

    templates: a run of each width, the smallest first. axes: the hyperparameters' values at the smallest width, by
    dotted key. seeds: (init_seed, data_seed) of every point.
    """

    name: str
    templates: Mapping[int, RunConfig]
    axes: Mapping[str, tuple[float, ...]]
    seeds: tuple[tuple[int, int], ...]

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.templates)

    @property
    def grid(self) -> Grid:
        """The base grid in log2."""
        return tuple(np.log2(values) for values in self.axes.values())

    def runs_at(self, width: int, point: Sequence[float]) -> list[RunConfig]:
        """Return the runs of one point, given in log2, on every seed."""
        content = self.templates[width].model_dump(mode="json")
        for key, value in zip(self.axes, point, strict=True):
            _put(content, key, float(f"{2.0**value:.4g}"))
        found = [content | {"init_seed": init, "data_seed": data} for init, data in self.seeds]
        return [RunConfig.parse(each, source=f"{self.name}, width {width}") for each in found]


def families(runs: Sequence[RunConfig]) -> list[Family]:
    """Return the families of a sweep. Raises: ValueError, one line, where they are no grid over doubled widths."""
    groups: dict[str, list[RunConfig]] = {}
    for run in runs:
        if run.branch is not None:
            raise ValueError(
                f"{run.run_id} is a branch, and telescoping compares whole runs; remove branched_decay and "
                "branched_batch from the sweep"
            )
        groups.setdefault(_shared(run), []).append(run)
    return [_family(own) for own in groups.values()]


def _family(runs: Sequence[RunConfig]) -> Family:
    first = runs[0]
    name = f"{first.optimizer.name} at {first.global_batch_tokens:,} tokens"
    widths = sorted({run.model.width for run in runs})
    check_doubling(widths)
    if first.stop_at_loss_nats is not None:
        raise ValueError(
            f"{name}: telescoping compares losses at equal tokens; take stop_at_loss_nats out of the sweep"
        )
    base = [run for run in runs if run.model.width == widths[0]]
    axes = _axes(base)
    _check(name, base, axes)
    return Family(
        name=name,
        templates={width: next(run for run in runs if run.model.width == width) for width in widths},
        axes=axes,
        seeds=tuple(sorted({(run.init_seed, run.data_seed) for run in base})),
    )


def _axes(runs: Sequence[RunConfig]) -> dict[str, tuple[float, ...]]:
    """Return the settings of the optimizer that take several values, the rate first."""
    settings: list[dict[str, Any]] = [dict(dotted(run.model_dump(mode="json")["optimizer"])) for run in runs]
    keys = sorted(settings[0], key=lambda key: f"optimizer.{key}" != RATE)
    values = {key: {json.dumps(own.get(key)): own.get(key) for own in settings} for key in keys}
    return {f"optimizer.{key}": tuple(_sorted(own.values())) for key, own in values.items() if len(own) > 1}


def _sorted(values: Iterable[Any]) -> list[Any]:
    """Sort numbers; leave anything else as it is, for `_check` to refuse."""
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _check(name: str, runs: Sequence[RunConfig], axes: Mapping[str, tuple[float, ...]]) -> None:
    if not axes:
        raise ValueError(f"{name}: nothing to tune; give the optimizer several learning rates")
    for key, values in axes.items():
        if any(isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 for value in values):
            raise ValueError(f"{name}: {key} is telescoped in its logarithm; its values are to be numbers above zero")
        ratios = np.array(values[1:]) / values[:-1]
        if len(values) < 3 or np.ptp(np.log(ratios)) > _UNEVEN:
            listed = ", ".join(f"{value:g}" for value in values)
            raise ValueError(
                f"{name}: {key} needs three values or more at one ratio, as 0.01, 0.02, 0.04; not {listed}"
            )
    seeds = {(run.init_seed, run.data_seed) for run in runs}
    full = len(seeds) * int(np.prod([len(values) for values in axes.values()]))
    if len(runs) != full:
        raise ValueError(f"{name}: the base width has {len(runs)} of the {full} runs of the full grid; cross all axes")


def _shared(run: RunConfig) -> str:
    content = run.model_dump(mode="json", exclude=set(_SEEDS))
    content["optimizer"] = run.optimizer.name
    for key in _SHAPE:
        content["model"].pop(key, None)
    return json.dumps(content, sort_keys=True)


def _put(content: dict[str, Any], key: str, value: float) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content[section]
    content[last] = value
