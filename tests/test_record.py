"""The record survives crashes, and says what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.record import EVALUATION_COLUMNS, append_row, read_json, read_rows, trim_rows, write_atomically, write_json


def row(step: int) -> dict[str, Any]:
    values = {str: "run", int: step, float: step / 3}
    return {name: values[column.type] for name, column in EVALUATION_COLUMNS.items()}


@pytest.fixture
def evaluations(tmp_path: Path) -> Path:
    path = tmp_path / "evaluations.jsonl"
    for step in range(4):
        append_row(path, row(step))
    return path


def test_rows_come_back_exactly(evaluations: Path) -> None:
    assert read_rows(evaluations) == [row(step) for step in range(4)]


def test_torn_last_line_is_dropped_wherever_it_tore(evaluations: Path) -> None:
    content = evaluations.read_bytes()
    last_line_starts = content[:-1].rindex(b"\n") + 1
    for length in range(last_line_starts, len(content)):
        evaluations.write_bytes(content[:length])
        assert read_rows(evaluations) == [row(step) for step in range(3)]


def test_corrupt_line_is_named(evaluations: Path) -> None:
    lines = evaluations.read_text().splitlines()
    evaluations.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"evaluations.jsonl, line 2: not a JSON row"):
        read_rows(evaluations)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"step": 4}, "line 5: not a row of a record"),
        ([1, 2], "line 5: not a row of a record"),
        (row(4) | {"loss": 1.0}, r"line 5: columns of another version \(loss\); update critbatch"),
    ],
)
def test_row_of_another_kind_or_version_is_named(evaluations: Path, added: Any, message: str) -> None:
    with evaluations.open("a") as file:
        file.write(json.dumps(added) + "\n")
    with pytest.raises(ValueError, match=message):
        read_rows(evaluations)


def test_row_of_an_older_version_lacks_what_it_could_not_know(evaluations: Path) -> None:
    older = {name: value for name, value in row(4).items() if name != "train_cpu_seconds"}
    with evaluations.open("a") as file:
        file.write(json.dumps(older) + "\n")
    assert read_rows(evaluations)[-1] == row(4) | {"train_cpu_seconds": None}


def test_append_row_refuses_missing_columns_and_nan(evaluations: Path) -> None:
    with pytest.raises(AssertionError):
        append_row(evaluations, {"step": 4})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(evaluations, row(4) | {"val_loss_nats": float("nan")})
    assert len(read_rows(evaluations)) == 4


def test_trim_rows_keeps_what_the_checkpoint_saw(evaluations: Path) -> None:
    trim_rows(evaluations, last_step=1)
    assert [r["step"] for r in read_rows(evaluations)] == [0, 1]
    trim_rows(evaluations, last_step=-1)
    assert read_rows(evaluations) == []


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("inf")})
    with pytest.raises(TypeError):
        write_atomically(path, "text, not bytes")  # type: ignore[arg-type]
    assert read_json(path) == {"status": "running"}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", ['{"status": "run', "[1, 2]", ""])
def test_truncated_json_is_named_with_advice(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: .*remove it to run this run again"):
        read_json(path)
