"""How runs are dealt to jobs, and jobs to arrays."""

import random

import pytest

from sweeps.clusters.packing import MOST_LIMITS, SIMILAR, of_similar_length, packed, time_limit_minutes
from sweeps.clusters.profile import ClusterProfile


def test_packed_shares_the_work_evenly_and_loses_no_run() -> None:
    seconds = {f"run-{number}": float(number) for number in range(1, 13)}
    longest_first = sorted(seconds, key=lambda run_id: -seconds[run_id])
    packs = packed(longest_first, seconds, runs_per_job=4)
    assert sorted(run_id for pack in packs for run_id in pack) == sorted(seconds)
    assert [len(pack) for pack in packs] == [4, 4, 4]
    assert max(sum(seconds[run_id] for run_id in pack) for pack in packs) <= 1.1 * sum(seconds.values()) / 3


@pytest.mark.parametrize(
    ("each_seconds", "jobs"), [(1.0, 1), (60.0, 10), (599.0, 99), (600.0, 100), (7200.0, 100), (None, 100)]
)
def test_packed_by_default_makes_jobs_of_about_ten_minutes(each_seconds: float | None, jobs: int) -> None:
    run_ids = [f"run-{number}" for number in range(100)]
    assert len(packed(run_ids, each_seconds and dict.fromkeys(run_ids, each_seconds), None)) == jobs  # type: ignore[arg-type]


def test_packed_of_nothing_is_nothing() -> None:
    assert packed([], {}, None) == packed([], None, 3) == []


@pytest.mark.parametrize(("seconds", "minutes"), [(None, 600), (0.0, 7), (3600.0, 127), (1e6, 600)])
def test_time_limit_is_the_work_with_margin_within_what_the_cluster_gives(seconds: float | None, minutes: int) -> None:
    profile = ClusterProfile(name="test", max_minutes=600, safety=2.0, startup_minutes=5.0, signal_seconds=120)
    assert time_limit_minutes(profile, seconds) == minutes


def test_jobs_within_a_factor_of_two_are_one_group_longest_first() -> None:
    assert of_similar_length([10, 100, 60, 9, 40, 50]) == [[1, 2, 5], [4], [0, 3]]
    assert of_similar_length([30]) == [[0]]
    assert of_similar_length([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_a_handful_each_of_similar_limits_and_lose_no_job(seed: int) -> None:
    chance = random.Random(seed)
    minutes = [round(10 ** chance.uniform(0, seed / 3)) for _ in range(300)]
    groups = of_similar_length(minutes)
    assert sorted(position for group in groups for position in group) == list(range(300))
    assert len(groups) <= MOST_LIMITS
    allowed = max(SIMILAR, 1.01 * (max(minutes) / min(minutes)) ** (1 / MOST_LIMITS))
    for group in groups:
        limits = [minutes[position] for position in group]
        assert limits[0] == max(limits) <= allowed * min(limits)


@pytest.mark.parametrize("ratio", [2, 3, 10])
def test_limits_that_grow_by_one_factor_are_a_handful_of_groups_too(ratio: int) -> None:
    assert len(of_similar_length([ratio**power for power in range(9)])) <= MOST_LIMITS
