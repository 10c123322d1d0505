"""The copy of the code that jobs run."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.record import read_json
from sweeps.clusters import snapshot
from sweeps.clusters.snapshot import PACKAGES, ROOT, snapshot_folder, take_snapshot
from sweeps.launch import submit_local
from sweeps.store import is_missing
from tests.sweep_examples import started


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with packages of our names."""
    root = tmp_path / "checkout"
    for package in PACKAGES:
        (root / package / "__pycache__").mkdir(parents=True)
        (root / package / "__init__.py").write_text(f"NAME = {package!r}\n")
        (root / package / "data.yaml").write_text("key: value\n")
        (root / package / "__pycache__" / "old.pyc").write_text("old")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    (root / ".gitignore").write_text("__pycache__")
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


def copy_of_this_code(place: Path) -> Path:
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def test_snapshot_is_taken_once_for_each_content(checkout: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    first = take_snapshot(sweep, checkout)
    assert first == snapshot_folder(sweep, checkout) == take_snapshot(sweep, checkout)
    assert (first / "harness" / "data.yaml").read_text() == "key: value\n"
    assert not list(first.rglob("__pycache__"))
    (checkout / "harness" / "__init__.py").write_text("NAME = 'changed'\n")
    second = take_snapshot(sweep, checkout)
    assert second != first
    assert (first / "harness" / "__init__.py").read_text() == "NAME = 'harness'\n"
    assert sorted((sweep / "code").iterdir()) == sorted([first, second])


def test_snapshot_says_what_it_was_made_of(checkout: Path, tmp_path: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    clean = read_json(take_snapshot(tmp_path, checkout) / "provenance.json")
    assert (clean["commit"], clean["diff"]) == (commit.stdout.strip(), "")
    assert clean["packages"]["torch"]
    (checkout / "harness" / "__init__.py").write_text("NAME = 'changed'\n")
    (checkout / "sweeps" / "new.py").write_text("")
    changed = read_json(take_snapshot(tmp_path, checkout) / "provenance.json")
    assert "+NAME = 'changed'" in changed["diff"]
    assert changed["diff"].endswith("\nUntracked: sweeps/new.py")
    assert changed["lock_hash"] == clean["lock_hash"]
    assert changed["code_hash"] != clean["code_hash"]


def test_snapshot_says_that_a_long_difference_was_cut(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_LONGEST_DIFF", 40)
    (checkout / "harness" / "__init__.py").write_text("NAME = 'changed'\n")
    diff = read_json(take_snapshot(tmp_path, checkout) / "provenance.json")["diff"]
    assert len(diff.splitlines()[0]) <= 40
    assert re.search(r"… cut: \d+ characters in all; the snapshot itself is whole$", diff)


def test_snapshot_outside_a_checkout_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    (checkout / ".git").rename(tmp_path / "away")
    assert read_json(take_snapshot(tmp_path, checkout) / "provenance.json")["commit"] is None


def test_snapshot_of_this_code_is_what_a_process_imports(tmp_path: Path) -> None:
    copy = take_snapshot(tmp_path)
    (tmp_path / "analysis").mkdir()  # where the process starts
    code = "import analysis, sweeps.clusters.job as job; print(analysis.__file__, job.__file__)"
    environment = {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    imported = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert imported == [str(copy / "analysis" / "__init__.py"), str(copy / "sweeps" / "clusters" / "job.py")]
    assert {path.name for path in (ROOT / "sweeps" / "presets").iterdir()} == {
        path.name for path in (copy / "sweeps" / "presets").iterdir()
    }


def test_pool_trains_with_the_code_that_it_was_started_with(tmp_path: Path) -> None:
    checkout, folder = copy_of_this_code(tmp_path / "checkout"), started(tmp_path / "small")
    (folder.path / "behaviour.txt").write_text("exit-once")  # so that every run starts a worker
    code = (
        "import sys; from pathlib import Path; from sweeps.store import SweepFolder\n"
        "from sweeps.launch import run_folder\n"
        "run_folder(SweepFolder(Path(sys.argv[1])), 1, train='tests.fake_training:train')"
    )
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    pool = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], cwd=tmp_path, env=environment)
    while not list(folder.path.glob("runs/*/attempts.txt")):
        assert pool.poll() is None
        time.sleep(0.05)
    for package in PACKAGES:
        (checkout / package / "__init__.py").write_text("raise RuntimeError('not the code that was started')")
    assert pool.wait(60) == 0
    assert not any(is_missing(folder.run(run.run_id)) for run in folder.read_manifest().runs)


def test_job_on_this_machine_trains_with_the_code_that_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("STEP_SECONDS", "0")
    folder = started(tmp_path / "small")
    [job] = submit_local(folder, 1, train="tests.stepping:train")
    job.result()
    [code] = (folder.path / "code").iterdir()
    for run in folder.read_manifest().runs:
        assert read_json(folder.run(run.run_id).run)["code_commit"] == code.name
