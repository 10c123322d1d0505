"""How often a run may crash: what kills its processes from outside may have been the machine's fault."""

from collections import Counter

from harness.record import RunFolder

#: A run whose process dies is taken up once more; then it is the run's fault, unless it came further in between.
CRASHES_ALLOWED = 1


class Crashes:
    """The crashes of runs, counted anew from each of their checkpoints."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[RunFolder, int | None]] = Counter()

    def add(self, run: RunFolder) -> int:
        """Count a crash; return how many there were without progress, this one included."""
        checkpoint = run.checkpoint.stat().st_mtime_ns if run.checkpoint.exists() else None
        self._counts[run, checkpoint] += 1
        return self._counts[run, checkpoint]
