"""What a record says of the code and the machine that made it."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from harness import origin
from harness.origin import code_commit, code_snapshot, installed_packages, job_id, lock_hash


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, "17_2"),
    ],
)
def test_job_id_is_what_slurm_calls_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str | None
) -> None:
    for each in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(each, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert job_id() == name


@pytest.mark.parametrize(
    ("said", "commit"),
    [
        ({"commit": "0123456789abcdef", "diff": ""}, "0123456789ab"),
        ({"commit": "0123456789abcdef", "diff": "--- a"}, "0123456789ab+"),
        ({"commit": None, "diff": ""}, None),
    ],
)
def test_code_of_a_snapshot_is_named_by_what_the_snapshot_says(
    tmp_path: Path, said: dict[str, Any], commit: str | None
) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps(said | {"code_hash": "feedfacecafe"}))
    assert code_snapshot(tmp_path / "harness") == "feedfacecafe"
    assert code_commit(tmp_path / "harness") == commit


def test_code_outside_a_checkout_and_a_snapshot_has_neither_name(tmp_path: Path) -> None:
    assert (code_snapshot(tmp_path), code_commit(tmp_path)) == (None, None)


def test_lock_hash_changes_with_any_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = installed_packages()
    assert list(installed) == sorted(installed)
    assert {"torch", "lightning", "polars"} <= installed.keys()
    before = lock_hash()
    assert len(before) == 12
    monkeypatch.setattr(origin, "installed_packages", lambda: installed | {"polars": "0.1"})
    assert lock_hash.__wrapped__() != before


def test_host_is_this_machine() -> None:
    assert origin.host_name() == platform.node() != ""


@pytest.mark.parametrize("version", ["550.54.15", None])
def test_driver_is_the_loaded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(origin, "_DRIVER_VERSION", tmp_path / "version")
    if version:
        (tmp_path / "version").write_text(f"{version}\n")
    assert origin.nvidia_driver() == version
