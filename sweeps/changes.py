"""What a sweep file changes in a folder that holds an earlier form of the sweep."""

from dataclasses import dataclass
from typing import Any

from harness.frozen import dotted
from sweeps.printing import counted
from sweeps.store import SweepFolder, is_missing

_KEYS_NAMED = 8


@dataclass(frozen=True)
class Contents:
    """A sweep as its folder has it: its settings by dotted key, and the runs that have a result."""

    settings: dict[str, Any]
    results: frozenset[str]


def contents(folder: SweepFolder) -> Contents:
    """Read a folder; one without a whole sweep in it has no contents."""
    try:
        spec, runs = folder.read_spec(), folder.read_manifest().runs
    except ValueError:
        return Contents({}, frozenset())
    results = frozenset(run.run_id for run in runs if not is_missing(folder.run(run.run_id)))
    return Contents(dict(dotted(spec.model_dump(mode="json", exclude_defaults=True))), results)


def changes_in_words(before: Contents, now: Contents) -> list[str]:
    """Say which keys differ and how many results are left out now; nothing where there was no sweep before."""
    missing = object()
    keys = before.settings | now.settings
    differ = [key for key in keys if before.settings.get(key, missing) != now.settings.get(key, missing)]
    left_out = len(before.results - now.results)
    lines = []
    if before.settings and differ:
        named = ", ".join(differ[:_KEYS_NAMED])
        others = f" and {len(differ) - _KEYS_NAMED} more" if len(differ) > _KEYS_NAMED else ""
        lines.append(f"The folder held another form of this sweep: it differed in {named}{others}.")
    if left_out:
        lines.append(f"{counted(left_out, 'finished run')} left the sweep; their folders stay.")
    return lines
