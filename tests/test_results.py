"""What is committed in results/ is what the code writes."""

from pathlib import Path

from analysis.schemas import RUNS, TABLES, data_dictionary

RESULTS = Path(__file__).parent.parent / "results"


def test_data_dictionary_lists_every_column_as_the_code_has_it() -> None:
    assert (RESULTS / "README.md").read_text().endswith(data_dictionary() + "\n")
    columns = [column for table in (RUNS, *TABLES.values()) for column in table.values()]
    assert all(column.meaning for column in columns)
