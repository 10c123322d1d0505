from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page.parts import over_models, parts
from analysis.schemas import TABLES
from tests.synthetic import Laboratory, records


@pytest.fixture(scope="module")
def twice():
    """The laboratory's tables under two protocols, those of the second for another model, too."""
    made = estimate(records(Laboratory()))
    return stacked(made, [("lab", "mid_schedule"), ("lab", "constant_ema"), ("large", "constant_ema")])


def stacked(estimates, names):
    def copies(frame):
        own = [
            frame.with_columns(
                **{
                    name: pl.lit(value)
                    for name, value in (("model", model), ("protocol", protocol))
                    if name in frame.columns
                }
            )
            for model, protocol in names
        ]
        return pl.concat(own)

    frames = {name: copies(getattr(estimates, name)) for name, columns in TABLES.items() if "protocol" in columns}
    runs = copies(estimates.records.runs).with_columns(run_id=pl.format("{}-{}-{}", "model", "protocol", "run_id"))
    return replace(estimates, records=replace(estimates.records, runs=runs), **frames)


def test_parts_never_mix_two_models_or_protocols_and_leave_no_row_out(twice):
    made = parts(twice)
    assert [part.label for part in made] == [
        "model lab, protocol constant_ema",
        "model lab, protocol mid_schedule",
        "model large, protocol constant_ema",
    ]
    for part in made:
        for frame in (part.estimates.cells, part.estimates.records.runs, part.estimates.token_ratios):
            assert set(frame["protocol"]) == {part.protocol}
            assert frame["model"].n_unique() == 1
    assert sum(part.estimates.cells.height for part in made) == twice.cells.height


def test_parts_of_one_model_and_protocol_have_no_label():
    (part,) = parts(estimate(records(Laboratory())))
    assert part.label == ""


def test_laws_keep_their_models_together_and_protocols_apart(twice):
    made = over_models(twice)
    assert [part.label for part in made] == ["protocol constant_ema", "protocol mid_schedule"]
    assert set(made[0].estimates.cells["model"]) == {"lab", "large"}


def test_a_law_over_all_models_is_in_no_part_of_one_model(twice):
    law = pl.DataFrame({"protocol": ["constant_ema"]}).select(
        *(pl.lit(None).alias(name) if name != "protocol" else "protocol" for name in TABLES["laws"])
    )
    made = replace(twice, laws=law.cast(dict(twice.laws.schema)))
    assert all(part.estimates.laws.is_empty() for part in parts(made))
    assert [part.estimates.laws.height for part in over_models(made)] == [1, 0]
