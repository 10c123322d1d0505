"""What `critbatch doctor` makes of what it sees; on a real Slurm: test_slurm_doctor.py."""

from pathlib import Path
from typing import Any

import pytest

from harness.origin import installed_packages
from sweeps.cli import main
from sweeps.clusters import doctor, probe
from sweeps.clusters.profile import ClusterProfile
from tests.slurm_stand_in import StandIn

PARTITION = {"PartitionName": "main", "State": "UP", "MaxTime": "1-00:00:00", "Default": "YES"}


def partition_findings(fields: dict[str, str], **profile: Any) -> list[tuple[str, str, str]]:
    findings = doctor._partition(ClusterProfile(name="test", **profile), {"main": PARTITION | fields})
    return [(finding.verdict, finding.seen, finding.advice) for finding in findings]


@pytest.mark.parametrize(
    ("limit", "minutes"), [("UNLIMITED", None), ("00:30:00", 30), ("01:05:00", 65), ("10-02:00:00", 14520)]
)
def test_time_limit_of_a_partition_is_read_in_minutes(limit: str, minutes: int | None) -> None:
    assert doctor._minutes(limit) == minutes


@pytest.mark.parametrize(
    ("fields", "profile", "verdict", "advice"),
    [
        ({}, {}, "good", ""),
        ({}, {"partition": "main"}, "good", ""),
        ({}, {"partition": "long"}, "bad", "set partition to one of: main"),
        ({"Default": "NO"}, {}, "bad", "set partition to one of: main"),
        ({"State": "DOWN"}, {}, "bad", "wait, or take another partition"),
        ({}, {"max_minutes": 1441}, "bad", "set max_minutes to 1440 or less"),
    ],
)
def test_partition_is_judged_with_advice(
    fields: dict[str, str], profile: dict[str, Any], verdict: str, advice: str
) -> None:
    found = partition_findings(fields, **profile)[0]
    assert (found[0], found[2]) == (verdict, advice)


def test_preemption_with_less_notice_than_the_signal_is_a_warning() -> None:
    preempted = {"PreemptMode": "REQUEUE", "GraceTime": "30"}
    assert [found[0] for found in partition_findings(preempted, signal_seconds=60)] == ["good", "warning"]
    assert [found[0] for found in partition_findings(preempted, signal_seconds=30)] == ["good"]


@pytest.mark.parametrize(("size", "verdict"), [(1000, "good"), (1001, "good"), (1002, "bad")])
def test_array_size_is_held_against_the_clusters(size: int, verdict: str) -> None:
    assert doctor._array_size(ClusterProfile(name="test", max_array_size=size), 1001).verdict == verdict


@pytest.mark.parametrize(("node", "verdict"), [(100.0, "good"), (112.0, "good"), (90.0, "bad"), (130.0, "bad")])
def test_clock_is_judged_by_when_the_job_can_have_read_it(node: float, verdict: str) -> None:
    assert probe._clock(node, 98.0, 110.0).verdict == verdict


def test_lock_that_the_node_does_not_see_is_bad() -> None:
    assert probe._lock(True, Path("results")).verdict == "good"
    assert "flock" in probe._lock(False, Path("results")).advice


def test_python_and_packages_are_those_of_here() -> None:
    here = {name: installed_packages()[name] for name in probe.PACKAGES}
    assert probe._packages(dict(here)).verdict == "good"
    assert probe._packages(here | {"numpy": "0.1"}).seen == f"numpy 0.1, here {here['numpy']}"
    assert probe._packages(here | {"numpy": "0.1"}).verdict == "warning"
    assert probe._packages(here | {"torch": None}).verdict == "bad"
    assert probe._python("2.7.18").verdict == "bad"


def test_lock_is_seen_across_processes(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        assert not probe._sees_lock(tmp_path / "lock")
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert probe._sees_lock(tmp_path / "lock")


@pytest.mark.parametrize(
    ("accelerator", "gpus_per_device", "gpus", "verdict"),
    [("auto", 0, 0, "good"), ("auto", 1, 0, "bad"), ("gpu", 0, 0, "bad"), ("gpu", 1, 2, "good")],
)
def test_missing_gpu_is_bad_where_one_is_asked_for(
    accelerator: Any, gpus_per_device: int, gpus: int, verdict: str
) -> None:
    profile = ClusterProfile(name="test", accelerator=accelerator, gpus_per_device=gpus_per_device)
    assert probe._devices(profile, gpus).verdict == verdict


def test_machine_without_slurm_is_told_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--cluster", "slurm", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("bad      commands: not on the PATH: sbatch, squeue, scancel, scontrol, srun\n")
    assert "run critbatch on a login node" in said


def test_job_that_stays_in_the_queue_is_given_up_with_slurms_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(tmp_path / "bin", monkeypatch)
    stand_in.says("squeue", "1001|PENDING||0|Priority|\n")
    [finding] = probe.run_probe(ClusterProfile(name="test"), tmp_path / "results", wait_seconds=1)
    assert (finding.verdict, finding.seen) == ("bad", "job 1001 still waited after 1 s (Priority)")
    assert stand_in.calls("scancel") == ["1001"]
    assert list((tmp_path / "results").iterdir()) == []


def test_local_needs_no_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cluster", "local"]) == 2
    assert "local is this machine" in capsys.readouterr().err
