"""The further axes of `critbatch tune`: `optimizer.weight_decay=0.05,0.1,0.2`, read and checked."""

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from harness.config import RunConfig
from harness.frozen import nearest
from sweeps.tuning.cells import TunedCell, tuned_cells

Axes = dict[str, list[Any]]

#: What may be tuned; the rest is the question that a sweep asks, or its budget.
_SECTIONS = ("optimizer", "schedule", "averaging")
_SINGLE = ("max_grad_norm",)
_TUNED_ANYWAY = ("optimizer.peak_lr", "optimizer.name")


def read_axes(texts: Iterable[str], runs: Sequence[RunConfig]) -> Axes:
    """Read `key=value,value` for each axis.

    Raises: ValueError for a key that no run has, with the nearest one; for no values, or one that no run may have.
    """
    axes: Axes = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not values.strip():
            raise ValueError(
                f"--axis {text}: expected key=value,value, as in --axis optimizer.weight_decay=0.05,0.1,0.2"
            )
        if key in axes:
            raise ValueError(f"--axis {text}: {key} is given twice; put all its values into one list")
        axes[key] = _values(text, key, values, runs)
    return axes


def _values(text: str, key: str, values: str, runs: Sequence[RunConfig]) -> list[Any]:
    """Return the values as a run has them: 1 becomes 1.0 where a number is expected."""
    cells = tuned_cells(runs)
    concerned = [cell for cell in cells if key in cell.setting(cell.template, [key])]
    valid = {name for cell in cells for name in _tunable(cell)}
    if key not in valid or not concerned:
        raise ValueError(f"--axis {text}: no run has {key!r} to tune; {nearest(key, valid)}")
    try:
        given = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        raise ValueError(f"--axis {text}: {values!r} is no list of values, as 0.05,0.1,0.2") from None
    found: list[Any] = []
    for value in given:
        for cell in concerned:
            run = cell.run(cell.rates[0], cell.seeds[0], {key: value})
            known = cell.setting(run, [key])[key]
        if known not in found:
            found.append(known)
    return found


def _tunable(cell: TunedCell) -> Iterable[str]:
    content = cell.template.model_dump(mode="json")
    sections = [f"{section}.{key}" for section in _SECTIONS for key in content[section]]
    nested = [
        f"{section}.{key}.{name}"
        for section in _SECTIONS
        for key, value in content[section].items()
        if isinstance(value, dict)
        for name in value
    ]
    return set(sections + nested + [key for key in _SINGLE if key in content]) - set(_TUNED_ANYWAY)
