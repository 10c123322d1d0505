"""Token budgets of curves that state none."""

from pathlib import Path

import pytest

from analysis.estimate import EstimateOptions, estimate
from analysis.inputs.nominal_budgets import one_budget_each
from analysis.inputs.outside import from_tables
from analysis.inputs.records import Records

BATCHES = (30, 100, 400, 1600)
HEADER = "optimizer,global_batch_tokens,seed,tokens_seen,val_loss_nats\n"


def curve(optimizer: str, batch: int, budget: int, end: float, seed: int = 0) -> str:
    marks = [budget // 4 // batch * batch, budget // batch * batch]
    return "".join(f"{optimizer},{batch},{seed},{mark},{loss}\n" for mark, loss in zip(marks, (4, end), strict=True))


def read(folder: Path, *curves: str) -> Records:
    (folder / "curves.csv").write_text(HEADER + "".join(curves))
    return from_tables([folder / "curves.csv"])


@pytest.mark.parametrize(
    ("ends", "largest_batch", "budgets"),
    [
        ([9_990, 10_000, 8_400], 1600, {8_400: 8_400, 9_990: 10_000, 10_000: 10_000}),
        ([9_990, 10_000, 8_401], 1600, {8_401: 10_000, 9_990: 10_000, 10_000: 10_000}),
        ([10_000, 9_900, 9_901], 1, {9_900: 9_900, 9_901: 10_000, 10_000: 10_000}),
        ([], 1, {}),
    ],
)
def test_ends_within_a_step_of_the_largest_batch_or_a_hundredth_are_one_budget(
    ends: list[int], largest_batch: int, budgets: dict[int, int]
) -> None:
    assert one_budget_each(ends, largest_batch) == budgets


def test_curves_of_one_budget_compare_though_every_batch_ends_elsewhere(tmp_path: Path) -> None:
    losses = {"adamw": (2.0, 2.1, 2.2, 2.4), "muon": (1.9, 2.0, 2.1, 2.2)}
    made = read(
        tmp_path,
        *(
            curve(name, batch, 99_999, loss + 0.01 * seed * (batch % 7 - 3) * len(name), seed)
            for name, own in losses.items()
            for batch, loss in zip(BATCHES, own, strict=True)
            for seed in (0, 1)
        ),
    )
    assert made.runs["token_budget"].unique().to_list() == [99_990]
    assert any(note.endswith("are taken for one: 100K (16 runs)") for note in made.notes)
    tables = estimate(made, EstimateOptions(questions=("budgets",)))
    assert tables.gaps["global_batch_tokens"].to_list() == list(BATCHES)
    at_first = tables.iso_loss.row(0, named=True)
    assert 30 * at_first["batch_ratio"] == pytest.approx(100, rel=0.5)


def test_run_that_diverged_was_given_the_budget_of_those_that_ended(tmp_path: Path) -> None:
    broken = "adamw,100,1,20000,4.0\nadamw,100,1,30000,nan\n"
    made = read(tmp_path, curve("adamw", 100, 100_000, 2.0), curve("adamw", 100, 50_000, 2.5, seed=2), broken)
    budgets = dict(made.runs.select("data_seed", "token_budget").iter_rows())
    assert budgets == {0: 100_000, 1: 50_000, 2: 50_000}


def test_iso_loss_is_refused_where_the_challenger_has_one_batch(tmp_path: Path) -> None:
    rivals = [curve("adamw", batch, 100_000, 2.0 + batch / 1e4) for batch in BATCHES]
    made = read(tmp_path, *rivals, curve("muon", 100, 100_000, 1.9))
    rows = estimate(made, EstimateOptions(questions=("budgets",))).iso_loss
    assert set(rows["verdict"]) == {"refused"}
    assert rows["batch_ratio"].null_count() == rows.height == len(BATCHES)
    assert "one batch of Muon" in rows["explanation"][0]
