"""Where a process runs and with which code: known without torch, so that a queue can say it too."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from harness.record import read_json

#: Beside the packages of a code snapshot: the commit and the difference that they were copied from.
PROVENANCE_JSON = "provenance.json"

_PACKAGE = Path(__file__).resolve().parent
_DRIVER_VERSION = Path("/sys/module/nvidia/version")


def host_name() -> str:
    return platform.node()


def job_id() -> str | None:
    """Return Slurm's name of this job, `<array>_<task>` in an array; null outside one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def nvidia_driver() -> str | None:
    """Return the version of the loaded NVIDIA driver."""
    return _DRIVER_VERSION.read_text().strip() if _DRIVER_VERSION.exists() else None


@cache
def installed_packages() -> dict[str, str]:
    """Return the version of every installed distribution, by its name in lower case; of two, the one imported."""
    found: dict[str, str] = {}
    for each in distributions():
        found.setdefault(each.name.lower(), each.version)
    return dict(sorted(found.items()))


@cache
def lock_hash() -> str:
    """Return 12 hex digits of all installed versions."""
    lines = "\n".join(f"{name}=={version}" for name, version in installed_packages().items())
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def code_snapshot(package: Path = _PACKAGE) -> str | None:
    """Return the hash of the snapshot that this code was copied to when it was queued; null outside one."""
    return _snapshot(package).get("code_hash")


@cache
def code_commit(package: Path = _PACKAGE) -> str | None:
    """Return the commit of the checkout that this code lies in, or was copied from, with + for local changes; null
    outside a checkout. It is asked for once: the checkout may change while this process runs on.

    Code in an environment that lies inside another project's checkout is not tracked there: null too.
    """
    if snapshot := _snapshot(package):
        commit, changed = snapshot.get("commit"), snapshot.get("diff")
        return f"{commit[:12]}{'+' if changed else ''}" if commit else None
    commit = git_says(package, ".", "rev-parse", "--short=12", "HEAD")
    changed = git_says(package, ".", "status", "--porcelain", "--", ".")
    return f"{commit}{'+' if changed else ''}" if commit else None


@cache
def code_difference(package: Path = _PACKAGE) -> str | None:
    """Return how this code differs from its commit: git's diff, then the files that it does not track; null outside a
    checkout, and for a snapshot, which has its own beside it.
    """
    return None if _snapshot(package) else checkout_difference(package, ".")


def checkout_difference(root: Path, *places: str) -> str | None:
    """Return how some places of a checkout differ from its commit, as `code_difference` does."""
    changed = git_says(root, places, "diff", "HEAD", "--", *places)
    untracked = git_says(root, places, "ls-files", "--others", "--exclude-standard", "--", *places)
    if changed is None or untracked is None:
        return None
    return "\n".join([*([changed] if changed else []), *(f"Untracked: {path}" for path in untracked.splitlines())])


def git_says(root: Path, places: Iterable[str], *words: str) -> str | None:
    """Return what git says in a folder; null where nothing in `places` is tracked."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", *places)
        return git(*words)
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Return the code of this process, and all that is installed beside it."""
    return {
        "code_commit": code_commit(),
        "code_snapshot": code_snapshot(),
        "code_difference": code_difference(),
        "python_version": platform.python_version(),
        "lock_hash": lock_hash(),
        "packages": installed_packages(),
    }


def _snapshot(package: Path) -> dict[str, Any]:
    path = package.parent / PROVENANCE_JSON
    return read_json(path) if path.exists() else {}
