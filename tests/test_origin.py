"""What a record says of the code and the machine that made it."""

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness import origin
from harness.origin import code_commit, code_difference, code_snapshot, installed_packages, job_id, lock_hash


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
    assert (code_snapshot(tmp_path), code_commit(tmp_path), code_difference(tmp_path)) == (None, None, None)


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package of one file, committed."""
    package = tmp_path / "harness"
    package.mkdir()
    (package / "origin.py").write_text("one\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "first")
    return package


@pytest.mark.parametrize(
    ("file", "difference"), [("origin.py", "-one\n+two"), ("added.py", "Untracked: added.py"), (None, "")]
)
def test_changed_code_is_named_by_its_commit_and_how_it_differs(
    checkout: Path, file: str | None, difference: str
) -> None:
    if file:
        (checkout / file).write_text("two\n")
    commit, said = code_commit(checkout), code_difference(checkout)
    assert commit is not None
    assert re.fullmatch(r"[0-9a-f]{12}\+" if file else r"[0-9a-f]{12}", commit)
    assert said is not None
    assert said.endswith(difference)
    assert bool(said) == bool(file)


def test_code_is_what_it_was_when_the_process_asked_first(checkout: Path) -> None:
    """The checkout may change under a worker that has long imported it."""
    before = code_commit(checkout)
    (checkout / "origin.py").write_text("two\n")
    assert code_commit(checkout) == before


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
