"""The processes of a Slurm on this machine, found by the configuration they were started with.

Run as a program, this module is a cluster's guard: `python slurm_processes.py CONFIGURATION` waits for the end of its
input, which comes when the cluster's owner stops it or is gone itself, and kills whatever then is left.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


def end_processes(find: Callable[[], Iterable[int]]) -> None:
    """Kill what `find` finds until it finds nothing: a process may have children while it is looked at.

    Raises: TimeoutError after 30 s.
    """
    end = time.monotonic() + 30
    while found := list(find()):
        if time.monotonic() > end:
            raise TimeoutError(f"processes that do not end: {found}")
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def processes_of(configuration: Path) -> dict[int, set[str]]:
    """Return the environment, by process number, of the daemons, steps, jobs and clients with this configuration."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            environment = set((folder / "environ").read_text(errors="replace").split("\0"))
            if f"SLURM_CONF={configuration}" in environment and int(folder.name) != os.getpid():
                found[int(folder.name)] = environment
    return found


def has_open(pid: int, path: Path) -> bool:
    """Tell whether a process holds a file open."""
    with suppress(OSError):
        return any(link.readlink() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    return False


if __name__ == "__main__":
    sys.stdin.read()
    end_processes(lambda: processes_of(Path(sys.argv[1])))
