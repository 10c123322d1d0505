"""Settings that a sweep varies beside optimizer, batch, learning rate and seed: they must not be pooled in one cell.

A setting that takes several values at one model, optimizer and batch splits it: settings of the optimizer go into the
optimizer's name (`muon, momentum=0.95`), all others into the model's (`115k, warmup_tokens=65536`). So every table
keeps them apart by the columns it has anyway, and optimizers are compared at equal settings.
"""

import json
from collections.abc import Collection
from typing import Any

import polars as pl

from harness.frozen import dotted
from harness.identity import NOT_SCIENCE, NOT_SCIENCE_OF_RUN

#: What may differ between the runs of a cell.
_WITHIN_A_CELL = (
    {"optimizer.peak_lr", "token_budget", "init_seed", "data_seed", "stop_at_loss_nats"}
    | NOT_SCIENCE_OF_RUN
    | {f"{section}.{key}" for section, keys in NOT_SCIENCE.items() for key in keys}
)

#: What a branch is made of: its state to start from, and for a larger batch the batches and evaluations up to there.
_OF_A_BRANCH = ("branch", "batch_warmup", "evaluation")


def split_by_variants(runs: pl.DataFrame, tuned: Collection[str] = ()) -> pl.DataFrame:
    """Return the runs with the settings that vary within a cell added to `optimizer` and `model`.

    Those that were `tuned` beside the learning rate go into `tuning`: of these the best is chosen.
    """
    settings = _settings(runs)
    varying = _varying(runs, settings)
    chosen_from = sorted(varying & set(tuned))
    of_optimizer = sorted(key for key in varying - set(tuned) if key.startswith("optimizer."))
    of_model = sorted(varying - set(tuned) - set(of_optimizer))
    return runs.with_columns(
        optimizer=_labels(runs["optimizer"], settings, of_optimizer),
        model=_labels(runs["model"], settings, of_model),
        tuning=_labels(runs["tuning"], settings, chosen_from),
    )


def differing_settings(runs: pl.DataFrame) -> list[str]:
    """Return the settings that take several values within one model, optimizer and batch, by their full names."""
    return sorted(_varying(runs, _settings(runs)))


def first_variant(optimizer: str, runs: pl.DataFrame) -> str:
    """Return the name that an optimizer bears among the runs: its own, or that of its first variant."""
    names = sorted(runs["optimizer"].unique())
    return next((name for name in names if name == optimizer or name.startswith(f"{optimizer}, ")), optimizer)


def _settings(runs: pl.DataFrame) -> list[dict[str, str]]:
    """Return each run's settings by dotted key, as JSON, but those of its cell; none without its configuration.

    Runs of a cell have one dictionary in common: thousands of runs are a few configurations.
    """
    distinct: dict[str, dict[str, str]] = {}
    return [_shared(_without_own(json.loads(config or "{}")), distinct) for config in runs["config_json"]]


def _shared(config: dict[str, Any], distinct: dict[str, dict[str, str]]) -> dict[str, str]:
    text = json.dumps(config, sort_keys=True)
    if text not in distinct:
        distinct[text] = {key: json.dumps(value) for key, value in dotted(config)}
    return distinct[text]


def _without_own(config: dict[str, Any]) -> dict[str, Any]:
    """Take out what may differ between the runs of a cell; branches of one kind are alike wherever they start."""
    if branch := config.get("branch"):
        config = {key: value for key, value in config.items() if key not in _OF_A_BRANCH}
        config["branch"] = {"kind": branch["kind"]}
    for key in _WITHIN_A_CELL:
        section, _, name = key.rpartition(".")
        (config.get(section, {}) if section else config).pop(name, None)
    return config


def _varying(runs: pl.DataFrame, settings: list[dict[str, str]]) -> set[str]:
    cells = runs.select("model", "optimizer", "global_batch_tokens").iter_rows()
    first: dict[tuple[Any, ...], dict[str, str]] = {}
    varying: set[str] = set()
    for cell, own in zip(cells, settings, strict=True):
        other = first.setdefault((*cell, own.get("branch.kind")), own)  # a branch is no variant of its trunk
        if own is not other:
            varying |= {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
    return varying


def _labels(names: pl.Series, settings: list[dict[str, str]], keys: list[str]) -> pl.Series:
    """Append `key=value` for each key that the run has; the last part of a key where that is unambiguous."""
    short = {key: key.rpartition(".")[2] for key in keys}
    ambiguous = {name for name in short.values() if list(short.values()).count(name) > 1}
    shown = {key: key if name in ambiguous else name for key, name in short.items()}
    labels = [
        ", ".join(
            [*([name] if name else []), *(f"{shown[key]}={own[key].strip(chr(34))}" for key in keys if key in own)]
        )
        for name, own in zip(names, settings, strict=True)
    ]
    return pl.Series(names.name, labels, dtype=pl.String)
