"""How runs are put into jobs, how long a job may take, and which jobs are alike enough to be one array: arithmetic."""

import heapq
import math
from collections.abc import Mapping, Sequence

from sweeps.clusters.profile import ClusterProfile

#: Jobs shorter than this cost more to queue and to start than to run: their runs are packed.
SHORTEST_JOB_SECONDS = 600.0

#: The jobs of an array have one time limit: that of its longest is at most so many times that of its shortest …
SIMILAR = 2.0

#: … unless that took more arrays than these.
MOST_LIMITS = 5

#: Of a run, by its run_id; none where the speed is not known.
Seconds = Mapping[str, float] | None


def packed(run_ids: Sequence[str], seconds: Seconds, runs_per_job: int | None) -> list[tuple[str, ...]]:
    """Deal the runs, longest first, to jobs: each to the job with the least to do so far.

    `runs_per_job` bounds how many one gets; without it, jobs are as many as last `SHORTEST_JOB_SECONDS` on average, or
    one for each run where `seconds` are not known.
    """
    if not run_ids:
        return []
    if runs_per_job is None and seconds is not None:
        total = sum(seconds[run_id] for run_id in run_ids)
        jobs = min(max(int(total / SHORTEST_JOB_SECONDS), 1), len(run_ids))
    else:
        jobs = math.ceil(len(run_ids) / (runs_per_job or 1))
    packs: list[list[str]] = [[] for _ in range(jobs)]
    loads = [(0.0, number) for number in range(jobs)]
    for run_id in run_ids:
        load, number = heapq.heappop(loads)
        packs[number].append(run_id)
        if runs_per_job is None or len(packs[number]) < runs_per_job:
            heapq.heappush(loads, (load + (seconds[run_id] if seconds else 1.0), number))
    return [tuple(pack) for pack in packs]


def time_limit_minutes(profile: ClusterProfile, seconds: float | None) -> int:
    """Return the minutes to ask for, for a job whose runs should take `seconds`; the cluster's most if not known."""
    if seconds is None:
        return profile.max_minutes
    minutes = profile.safety * seconds / 60 + profile.startup_minutes + profile.signal_seconds / 60
    return min(math.ceil(minutes), profile.max_minutes)


def of_similar_length(minutes: Sequence[int]) -> list[list[int]]:
    """Return the positions of jobs in groups, longest first: in each, limits lie within the factor `SIMILAR`, or within
    the one that gives `MOST_LIMITS` groups.
    """
    if not minutes:
        return []
    factor = max(SIMILAR, (max(minutes) / min(minutes)) ** (1 / MOST_LIMITS) * (1 + 1e-9))
    groups: list[list[int]] = []
    for position in sorted(range(len(minutes)), key=lambda position: -minutes[position]):
        if not groups or minutes[groups[-1][0]] > factor * minutes[position]:
            groups.append([])
        groups[-1].append(position)
    return groups
