"""What `critbatch doctor` finds on a real Slurm."""

from pathlib import Path

import pytest

from sweeps.cli import main
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm


def test_doctor_finds_a_good_cluster_ready_and_says_what_is_wrong_with_a_bad_one(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profiles = tmp_path / "critbatch" / "clusters"
    profiles.mkdir(parents=True)
    (profiles / "good.yaml").write_text("accelerator: cpu\nsignal_seconds: 10\n")
    (profiles / "lost.yaml").write_text("partition: man\n")
    (profiles / "broken.yaml").write_text("max_array_size: 50000\npython: /nowhere/python\n")
    assert main(["doctor", "--cluster", "good", "--results", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert {line.split(":")[0] for line in said.splitlines() if line.startswith("good  ")} == {
        f"good     {what}"
        for what in ("commands", "partition", "array size", "accounts", "test job", "clock", "shared folder", "Python",
                     "packages", "code", "requeue")
    }  # fmt: skip
    assert said.splitlines()[-1] == "good is ready: critbatch submit SWEEP --cluster good"
    assert list((tmp_path / "results").iterdir()) == []
    assert main(["doctor", "--cluster", "lost", "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().out
    assert "bad      partition: there is no man" in said
    assert "set partition to one of: main, high, low, lownograce" in said
    assert main(["doctor", "--cluster", "broken", "--results", str(tmp_path / "results")]) == 1
    said = capsys.readouterr().out
    assert "set max_array_size to 10001" in said
    assert "/nowhere/python: No such file or directory" in said
    assert slurm.run("squeue", "--noheader") == ""
