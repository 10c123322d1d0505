"""How often the kernel has killed a process of this control group because memory ran out."""

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def oom_kills(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return the count of this process' control group, version 2 or 1; 0 where it cannot be read."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            place = cgroups / controllers / path.lstrip("/")
            for file in (place / "memory.events", place / "memory.oom_control"):
                if (count := _count(file)) is not None:
                    return count
    return 0


def _count(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    counts = [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return counts[0] if counts else None
