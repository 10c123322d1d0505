"""Settings that vary within a cell split it; what belongs to a cell does not."""

import json
from typing import Any

import polars as pl

from analysis.inputs.variants import first_variant, split_by_variants


def runs(*rows: tuple[str, int, dict[str, Any]]) -> pl.DataFrame:
    columns = {
        "model": ["115k"] * len(rows),
        "optimizer": [optimizer for optimizer, _, _ in rows],
        "global_batch_tokens": [batch for _, batch, _ in rows],
        "tuning": [""] * len(rows),
        "config_json": [json.dumps(config) for _, _, config in rows],
    }
    return pl.DataFrame(columns)


def config(warmup: int = 16, **optimizer: Any) -> dict[str, Any]:
    return {"schedule": {"warmup_tokens": warmup}, "optimizer": optimizer, "init_seed": optimizer.pop("seed", 0)}


def test_warmup_splits_the_model() -> None:
    split = split_by_variants(runs(("adamw", 1, config(16)), ("adamw", 1, config(64)), ("muon", 1, config(16))))
    expected = ["115k, warmup_tokens=16", "115k, warmup_tokens=64", "115k, warmup_tokens=16"]
    assert split["model"].to_list() == expected
    assert split["optimizer"].to_list() == ["adamw", "adamw", "muon"]


def test_setting_of_an_optimizer_splits_that_optimizer_alone() -> None:
    split = split_by_variants(
        runs(("muon", 1, config(momentum=0.9)), ("muon", 1, config(momentum=0.95)), ("adamw", 1, config(eps=1e-8)))
    )
    assert split["optimizer"].to_list() == ["muon, momentum=0.9", "muon, momentum=0.95", "adamw"]
    assert first_variant("muon", split) == "muon, momentum=0.9"
    assert first_variant("adamw", split) == "adamw"


def test_a_setting_that_was_tuned_is_chosen_from_and_splits_nothing() -> None:
    given = runs(("muon", 1, config(momentum=0.9)), ("muon", 1, config(momentum=0.95)), ("adamw", 1, config(eps=1e-8)))
    split = split_by_variants(given, ["optimizer.momentum"])
    assert split["optimizer"].to_list() == ["muon", "muon", "adamw"]
    assert split["tuning"].to_list() == ["momentum=0.9", "momentum=0.95", ""]


def test_rates_seeds_and_settings_that_go_with_the_batch_split_nothing() -> None:
    given = runs(
        ("muon", 1, config(peak_lr=0.1, seed=0, momentum=0.9)),
        ("muon", 1, config(peak_lr=0.2, seed=1, momentum=0.9)),
        ("muon", 4, config(peak_lr=0.2, seed=1, momentum=0.8)),
    )
    assert split_by_variants(given).equals(given)


def test_equal_names_of_two_sections_are_told_apart() -> None:
    first = {"optimizer": {"eps": 1, "auxiliary": {"eps": 1}}}
    second = {"optimizer": {"eps": 2, "auxiliary": {"eps": 2}}}
    split = split_by_variants(runs(("muon", 1, first), ("muon", 1, second)))
    assert split["optimizer"][0] == "muon, optimizer.auxiliary.eps=1, optimizer.eps=1"


def test_runs_without_their_configuration_split_nothing() -> None:
    given = runs(("muon", 1, {}), ("muon", 1, {})).with_columns(config_json=pl.lit(None, pl.String))
    assert split_by_variants(given).equals(given)


def test_setting_that_only_some_runs_of_a_cell_have_splits_it() -> None:
    split = split_by_variants(runs(("muon", 1, config()), ("muon", 1, config(nesterov=True))))
    assert split["optimizer"].to_list() == ["muon", "muon, nesterov=true"]
