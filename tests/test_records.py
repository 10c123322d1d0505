"""Reading records back: round trips, damage, duplicates, speed."""

import json
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis.inputs.records import load, save
from harness.record import RunFolder, read_json, read_rows, write_json
from tests.disk import Disk
from tests.synthetic import Laboratory, plan, records, write_runs

LAB = Laboratory(batches=(1024, 4096), grid_seeds=(0,), fresh_seeds=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_runs(LAB, tmp_path)
    return tmp_path


def first_run(folder: Path) -> RunFolder:
    return RunFolder(min((folder / "runs").iterdir()))


def test_load_gives_back_what_was_written(folder: Path) -> None:
    loaded, expected = load(folder), records(LAB)
    assert_frame_equal(loaded.runs, expected.runs)
    assert_frame_equal(loaded.evaluations, expected.evaluations)
    assert loaded.manifest == expected.manifest


def test_load_reads_the_parquet_files_where_there_are_no_runs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    published = tmp_path_factory.mktemp("published")
    save(load(folder), published)
    (published / "sweep.json").write_bytes((folder / "sweep.json").read_bytes())
    assert_frame_equal(load(published).runs, load(folder).runs)
    assert_frame_equal(load(published).evaluations, load(folder).evaluations)


def test_save_on_a_full_disk_leaves_the_earlier_files(disk: Disk) -> None:
    made = records(LAB)
    save(made, disk.path)
    before = {path.name: path.read_bytes() for path in disk.path.iterdir()}
    disk.fill(room_bytes=4096)
    with pytest.raises(OSError, match="No space left"):
        save(made, disk.path)
    assert {path.name: path.read_bytes() for path in disk.path.iterdir()} == before


def test_load_drops_a_torn_last_line(folder: Path) -> None:
    path = first_run(folder).evaluations
    whole = load(folder).evaluations.height
    path.write_bytes(path.read_bytes()[:-20])
    assert load(folder).evaluations.height == whole - 1


def test_load_counts_a_row_that_was_written_twice_once(folder: Path) -> None:
    path = first_run(folder).evaluations
    lines = path.read_text().splitlines(keepends=True)
    again = lines[-1].replace('"train_seconds": ', '"train_seconds": 1')
    path.write_text("".join([*lines, lines[-2], again]))
    loaded = load(folder).evaluations.filter(pl.col("run_id") == path.parent.name)
    assert loaded.height == len(lines)
    assert loaded["train_seconds"][-1] > loaded["train_seconds"][-2] * 1.5  # the later one stays


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"step"', "step", 1), "line 1: not a JSON row"),
        (lambda text: text.replace('"step"', '"steps"', 1), "line 1: not a row of a record"),
        (lambda text: text.replace('"grad_norm": null', '"grad_norm": NaN"', 1), "line 1: not a JSON row"),
        (lambda text: "[1]\n" + text, "line 1: not a row of a record"),
        (lambda text: text.splitlines(keepends=True)[0] + "\0\0\0\n" + text, "line 2: not a JSON row"),
    ],
)
def test_load_names_the_file_and_line_that_is_corrupt(folder: Path, damage: object, message: str) -> None:
    path = first_run(folder).evaluations
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_load_names_a_truncated_run_file(folder: Path) -> None:
    path = first_run(folder).run
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole JSON file") as error:
        load(folder)
    assert str(path) in str(error.value)


def test_load_refuses_a_run_of_a_newer_version(folder: Path) -> None:
    path = first_run(folder).run
    write_json(path, read_json(path) | {"colour": "red"})
    with pytest.raises(ValueError, match=r"run.json: columns of another version \(colour\)"):
        load(folder)


def test_load_gives_null_for_columns_younger_than_the_record(folder: Path, tmp_path: Path) -> None:
    for run in map(RunFolder, (folder / "runs").iterdir()):
        write_json(run.run, {name: value for name, value in read_json(run.run).items() if name != "device"})
        rows = [{k: v for k, v in row.items() if k != "grad_norm"} for row in read_rows(run.evaluations)]
        run.evaluations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_folders = load(folder)
    assert from_folders.runs["device"].is_null().all()
    assert from_folders.evaluations["grad_norm"].is_null().all()
    save(from_folders, tmp_path)
    write_json(tmp_path / "sweep.json", read_json(folder / "sweep.json"))
    for name, column in (("runs", "device"), ("evaluations", "grad_norm")):
        path = tmp_path / f"{name}.parquet"
        pl.read_parquet(path).drop(column).write_parquet(path)
    from_parquet = load(tmp_path)
    assert from_parquet.runs.equals(from_folders.runs)
    assert from_parquet.evaluations.equals(from_folders.evaluations)


def test_load_leaves_out_runs_without_rows_and_keeps_the_status_of_the_others(tmp_path: Path) -> None:
    runs = plan(LAB)
    write_runs(LAB, tmp_path, [replace(runs[0], status="running"), *runs[1:]])
    unstarted, empty = (RunFolder(tmp_path / "runs" / run.run_id) for run in runs[1:3])
    unstarted.run.unlink()
    write_json(empty.run, read_json(empty.run) | {"status": "running"})
    empty.evaluations.unlink()
    loaded = load(tmp_path)
    assert set(loaded.runs["run_id"]) == {run.run_id for run in runs} - {run.run_id for run in runs[1:3]}
    assert loaded.runs.row(by_predicate=pl.col("run_id") == runs[0].run_id, named=True)["status"] == "running"
    assert set(loaded.evaluations["run_id"]) == set(loaded.runs["run_id"])


def test_load_refuses_a_finished_run_without_evaluations(folder: Path) -> None:
    run = first_run(folder)
    run.evaluations.write_text("")
    with pytest.raises(ValueError, match="no evaluation of the finished run") as error:
        load(folder)
    assert str(run.evaluations) in str(error.value)
    assert f"remove {run.run} to run this run again" in str(error.value)


def test_load_refuses_parquet_files_without_the_evaluations_of_a_finished_run(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    published, whole = tmp_path_factory.mktemp("published"), load(folder)
    lost = whole.runs["run_id"][0]
    save(replace(whole, evaluations=whole.evaluations.filter(pl.col("run_id") != lost)), published)
    (published / "sweep.json").write_bytes((folder / "sweep.json").read_bytes())
    with pytest.raises(ValueError, match=rf"evaluations\.parquet: no evaluation of the finished run {lost}"):
        load(published)


def test_load_says_when_a_folder_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sweep\.json"):
        load(tmp_path)


def test_load_says_when_no_run_has_started(tmp_path: Path) -> None:
    write_runs(LAB, tmp_path, [])
    with pytest.raises(ValueError, match="holds no run that has started"):
        load(tmp_path)


@pytest.mark.slow
def test_load_reads_ten_thousand_runs_in_seconds(tmp_path: Path) -> None:
    seeds = tuple(range(10_000 // 12))
    write_runs(replace(LAB, grid_seeds=seeds), tmp_path)
    started = time.perf_counter()
    assert load(tmp_path).runs.height == 12 * len(seeds)
    assert time.perf_counter() - started < 10
