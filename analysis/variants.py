"""Settings that a sweep varies beside optimizer, batch, learning rate and seed: they must not be pooled in one cell.

A setting that takes several values at one model, optimizer and batch splits it: settings of the optimizer go into the
optimizer's name (`muon, momentum=0.95`), all others into the model's (`115k, warmup_tokens=65536`). So every table
keeps them apart by the columns it has anyway, and optimizers are compared at equal settings.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

#: What may differ between the runs of a cell.
_WITHIN_A_CELL = frozenset(
    {"optimizer.peak_lr", "token_budget", "init_seed", "data_seed", "stop_at_loss_nats", "schedule.max_warmup_share"}
)
#: Where the text lies is no setting: the fingerprint says what it is.
_PLACES = ("corpus.paths", "corpus.tokenizer_path", "corpus.max_epochs", "model.preset")


def split_by_variants(runs: pl.DataFrame) -> pl.DataFrame:
    """Return the runs with the settings that vary within a cell added to `optimizer` and `model`."""
    settings = [dict(_flat(json.loads(config or "{}"))) for config in runs["config_json"]]
    cells = list(runs.select("model", "optimizer", "global_batch_tokens").iter_rows())
    varying = _varying(cells, settings)
    of_optimizer = sorted(key for key in varying if key.startswith("optimizer."))
    of_model = sorted(varying - set(of_optimizer))
    return runs.with_columns(
        optimizer=_labels(runs["optimizer"], settings, of_optimizer),
        model=_labels(runs["model"], settings, of_model),
    )


def differing_settings(runs: pl.DataFrame) -> list[str]:
    """Return the settings that take several values within one model, optimizer and batch, by their full names."""
    settings = [dict(_flat(json.loads(config or "{}"))) for config in runs["config_json"]]
    return sorted(_varying(list(runs.select("model", "optimizer", "global_batch_tokens").iter_rows()), settings))


def first_variant(optimizer: str, runs: pl.DataFrame) -> str:
    """Return the name that an optimizer bears among the runs: its own, or that of its first variant."""
    names = sorted(runs["optimizer"].unique())
    return next((name for name in names if name == optimizer or name.startswith(f"{optimizer}, ")), optimizer)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _varying(cells: list[tuple[Any, ...]], settings: list[dict[str, str]]) -> set[str]:
    first: dict[tuple[Any, ...], dict[str, str]] = {}
    varying: set[str] = set()
    for cell, own in zip(cells, settings, strict=True):
        other = first.setdefault(cell, own)
        varying |= {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
    return {key for key in varying if key not in _WITHIN_A_CELL and not key.startswith(_PLACES)}


def _labels(names: pl.Series, settings: list[dict[str, str]], keys: list[str]) -> pl.Series:
    """Append `key=value` for each key that the run has; the last part of a key where that is unambiguous."""
    short = {key: key.rpartition(".")[2] for key in keys}
    ambiguous = {name for name in short.values() if list(short.values()).count(name) > 1}
    shown = {key: key if name in ambiguous else name for key, name in short.items()}
    labels = [
        ", ".join([name, *(f"{shown[key]}={own[key].strip(chr(34))}" for key in keys if key in own)])
        for name, own in zip(names, settings, strict=True)
    ]
    return pl.Series(names.name, labels, dtype=pl.String)
