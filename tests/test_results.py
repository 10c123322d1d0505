"""What is committed in results/ is what the code writes."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis import format as fmt
from analysis.estimate import estimate
from analysis.inputs.load import read
from analysis.page.report import frames
from analysis.schemas import RUNS, TABLES, data_dictionary

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "results", (ROOT / "README.md").read_text()
REFERENCE = RESULTS / "reference" / "quickstart"
LOG = (RESULTS / "LOG.md").read_text()
TELESCOPE = RESULTS / "reference" / "telescope-small" / "tables"
HARDEST = pl.col("target_loss_nats") == 2.0


def test_data_dictionary_lists_every_column_as_the_code_has_it() -> None:
    assert (RESULTS / "README.md").read_text().endswith(data_dictionary() + "\n")
    columns = [column for table in (RUNS, *TABLES.values()) for column in table.values()]
    assert all(column.meaning for column in columns)


def test_reference_tables_are_what_the_code_makes_of_its_records() -> None:
    """To refresh them all: `critbatch report results/reference/quickstart`."""
    made = frames(estimate(read([REFERENCE])))
    for path in sorted((REFERENCE / "tables").glob("*.csv")):
        if path.stem != "agreement":
            committed = pl.read_csv(path, schema=made[path.stem].schema)
            assert_frame_equal(committed, made[path.stem], rel_tol=1e-4, abs_tol=1e-9)


def test_readme_quotes_the_reference() -> None:
    tables = {name: pl.read_csv(REFERENCE / "tables" / f"{name}.csv") for name in ("cells", "token_ratios")}
    trend = pl.read_csv(REFERENCE / "tables" / "ratio_trends.csv").row(by_predicate=HARDEST, named=True)
    for row in quoted_rows(tables["cells"], tables["token_ratios"]):
        assert row in README
    assert f"a slope of {interval(trend, 'slope', '{:.2f}')} in" in README
    for batches in at_hardest("critical_batches", definition="emin_over_smin"):
        in_thousands = {name: value / 1e3 for name, value in batches.items() if name.startswith("critical")}
        assert interval(in_thousands, "critical_batch_tokens", "{:.2f}K") in README
        if batches["optimizer"] == "adamw":
            assert f"an exponent of {batches['exponent']:.2f} is fitted" in README


@pytest.mark.parametrize("quantity", ["ratio_small_batch", "ratio_large_batch", "critical_batch_ratio"])
def test_readme_quotes_the_decomposition(quantity: str) -> None:
    (row,) = at_hardest("ratio_decomposition", quantity=quantity)
    assert interval(row, "value", "{:.2f}") in README


def test_readme_quotes_who_dominates() -> None:
    (row,) = at_hardest("dominance", kind="projected", cost="device_seconds")
    assert row["share"] == 1
    assert f"{interval(row, 'cost_ratio', '{:.2f}')} times on" in README


def test_readme_quotes_what_telescoping_cost() -> None:
    levels = pl.read_csv(TELESCOPE / "telescope_levels.csv").unique("width").sort("width")
    brute_force = levels["points"][0] * levels["level_flops"][-1] / levels["points"][-1]
    share = levels["level_flops"].sum() / brute_force
    assert f"telescoping took {share:.0%} of".replace("%", " %") in README
    assert f"{share:.1%} of the full grid".replace("%", " %") in LOG


def test_log_quotes_what_telescoping_found() -> None:
    answers = pl.read_csv(TELESCOPE / "telescope_answers.csv").sort("hyperparameter", descending=True)
    rate, multiplier = answers.rows(named=True)
    for row in (rate, multiplier):
        value, low, high = (f"{row[name]:.3g}".lstrip("0") for name in ("optimum", "optimum_low", "optimum_high"))
        assert f"{value} [{low}, {high}]" in LOG
    assert rate["alpha_log2_low"] < 0 < rate["alpha_log2_high"]
    assert multiplier["alpha_log2_high"] < 0


@pytest.mark.parametrize("sweep", ["branched-small", "separate-small"])
def test_tables_of_branches_are_what_the_code_makes_of_their_records(sweep: str) -> None:
    """To refresh them: `critbatch report results/reference/<sweep>`; only some of its files are kept."""
    folder = RESULTS / "reference" / sweep
    made = frames(estimate(read([folder])))
    for path in sorted((folder / "tables").glob("*.csv")):
        assert_frame_equal(
            pl.read_csv(path, schema=made[path.stem].schema), made[path.stem], rel_tol=1e-4, abs_tol=1e-9
        )


def test_branches_of_a_trunk_end_where_separate_runs_do_within_seed_noise() -> None:
    ends = [pl.col(f"final_loss_nats{end}") for end in ("", "_low", "_high")]
    branches, alone = (
        pl.read_csv(RESULTS / "reference" / sweep / "tables" / "final_losses.csv")
        .filter(pl.col("protocol") == protocol)
        .select("token_budget", *ends)
        for sweep, protocol in (("branched-small", "branched_decay"), ("separate-small", "decayed"))
    )
    both = alone.join(branches, on="token_budget", suffix="_branch").sort("token_budget")
    half_widths = [
        pl.col(f"final_loss_nats_high{which}") - pl.col(f"final_loss_nats{which}") for which in ("", "_branch")
    ]
    difference = both["final_loss_nats_branch"] - both["final_loss_nats"]
    known_to = both.select((half_widths[0] ** 2 + half_widths[1] ** 2).sqrt()).to_series()
    assert both.height == 5
    assert (difference.abs() < known_to).all()
    said = [f"{value:+.3f}".replace("0.", ".").replace("-", "−") for value in difference]
    assert f"{', '.join(said[:-1])} and {said[-1]} nats" in LOG


def test_costs_of_a_branch_are_those_of_the_tokens_that_it_took_itself() -> None:
    found = estimate(read([RESULTS / "reference" / "branched-small"]))
    cells = found.cells.filter(pl.col("protocol") == "branched_decay").drop_nulls("tokens_to_target")
    per_token = found.records.runs.select(
        pl.col("flops_per_token") + pl.col("optimizer_flops_per_step") / pl.col("global_batch_tokens").min()
    )
    assert cells.height == 2
    for share in cells["flops_to_target"] / cells["tokens_to_target"]:
        assert share == pytest.approx(per_token.item(0, 0), rel=1e-6)


def test_readme_and_log_quote_what_branching_saves() -> None:
    runs = pl.read_parquet(RESULTS / "reference" / "branched-small" / "runs.parquet")
    decays, trunks = runs.filter(pl.col("protocol") == "branched_decay"), runs.filter(pl.col("parent_run_id").is_null())
    spent = trunks["tokens_seen"].sum() + (decays["tokens_seen"] - decays["branch_tokens"]).sum()
    share = f"{spent / decays['tokens_seen'].sum():.0%}".replace("%", " %")
    assert f"nine budgets for {share} of the tokens" in README
    assert f"a share of {share}" in LOG


def test_log_quotes_the_critical_batch_over_training() -> None:
    table = pl.read_csv(RESULTS / "reference" / "branched-small" / "tables" / "critical_batches.csv")
    rows = table.filter(pl.col("definition") == "branched").sort("branch_tokens").rows(named=True)
    shown = [fmt.estimate(row, "critical_batch_tokens", fmt.decimal_tokens) for row in rows]
    assert f"| {' | '.join(shown)} |" in LOG


def at_hardest(name: str, **values: str) -> list[dict[str, Any]]:
    table = pl.read_csv(REFERENCE / "tables" / f"{name}.csv")
    return table.filter(HARDEST, **values).rows(named=True)


def quoted_rows(cells: pl.DataFrame, ratios: pl.DataFrame) -> Iterator[str]:
    """Yield the rows of the README's table, as the reference has them."""
    for ratio in ratios.filter(HARDEST).sort("global_batch_tokens").iter_rows(named=True):
        batch = ratio["global_batch_tokens"]
        at_batch = cells.filter(HARDEST, pl.col("global_batch_tokens") == batch)
        tokens = []
        for name in ("adamw", "muon"):
            cell = at_batch.row(by_predicate=pl.col("optimizer") == name, named=True)
            thousands = {key: value / 1e3 for key, value in cell.items() if key.startswith("tokens_to_target")}
            tokens.append(interval(thousands, "tokens_to_target", "{:.0f}"))
        shown = batch if batch < 1024 else f"{batch // 1024}K"
        yield f"| {shown} | {tokens[0]} | {tokens[1]} | {interval(ratio, 'token_ratio', '{:.2f}')} |"


def interval(row: Mapping[str, float], name: str, form: str) -> str:
    value, low, high = (form.format(row[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"
