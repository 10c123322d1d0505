"""What is committed in results/ is what the code writes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from analysis.schemas import RUNS, TABLES, data_dictionary

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "results", (ROOT / "README.md").read_text()
REFERENCE = RESULTS / "reference" / "quickstart"
HARDEST = pl.col("target_loss_nats") == 2.0


def test_data_dictionary_lists_every_column_as_the_code_has_it() -> None:
    assert (RESULTS / "README.md").read_text().endswith(data_dictionary() + "\n")
    columns = [column for table in (RUNS, *TABLES.values()) for column in table.values()]
    assert all(column.meaning for column in columns)


def test_readme_quotes_the_reference() -> None:
    tables = {name: pl.read_csv(REFERENCE / "tables" / f"{name}.csv") for name in ("cells", "token_ratios")}
    trend = pl.read_csv(REFERENCE / "tables" / "ratio_trends.csv").row(by_predicate=HARDEST, named=True)
    for row in quoted_rows(tables["cells"], tables["token_ratios"]):
        assert row in README
    assert f"a slope of {interval(trend, 'slope', '{:.2f}')} in" in README
    for batches in pl.read_csv(REFERENCE / "tables" / "critical_batches.csv").filter(HARDEST).iter_rows(named=True):
        if batches["definition"] == "emin_over_smin":
            in_thousands = {name: value / 1e3 for name, value in batches.items() if name.startswith("critical")}
            assert interval(in_thousands, "critical_batch_tokens", "{:.2f}K") in README


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
