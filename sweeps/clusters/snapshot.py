"""The code that was queued is the code that runs: a copy of the three packages, once for each content.

`<sweep>/code/<hash>/` holds the packages and `provenance.json`; jobs and workers start with it at the head of their
path.
"""

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.origin import PROVENANCE_JSON, checkout_difference, git_says, installed_packages, lock_hash
from harness.record import write_json

PACKAGES = ("analysis", "harness", "sweeps")

#: The folder that the packages of this process lie in.
ROOT = Path(__file__).resolve().parents[2]

#: Characters of a difference that are kept.
_LONGEST_DIFF = 1_000_000


def snapshot_folder(sweep: Path, root: Path = ROOT) -> Path:
    """Return where the copy of the packages below `root` is, or would be."""
    return _place(sweep, _contents(root))


def take_snapshot(sweep: Path, root: Path = ROOT) -> Path:
    """Copy the packages below `root` into the sweep's folder, unless they are there; return the copy's folder.

    Raises: ValueError when it cannot be written.
    """
    files = _contents(root)
    folder = _place(sweep, files)
    if folder.exists():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for path, content in files.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_bytes(content)
        write_json(temporary / PROVENANCE_JSON, provenance(root) | {"code_hash": folder.name})
        temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # no other process was faster
            raise ValueError(
                f"{folder} cannot be written ({error.strerror}); make room, or get the right to write"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def code_environment(code: Path, beside: str | None) -> dict[str, str]:
    """Return the variables with which Python takes the packages of a snapshot, then those on the path `beside`."""
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{code}:{beside}" if beside else str(code)}


@contextmanager
def children_import(code: Path) -> Iterator[None]:
    """Let the processes that this one spawns meanwhile take the packages of a snapshot: their path is this one's."""
    sys.path.insert(0, str(code))
    try:
        yield
    finally:
        sys.path.remove(str(code))


def content_hash(files: dict[Path, bytes]) -> str:
    """Return 12 hex digits of the names and contents."""
    digest = hashlib.sha256()
    for path, content in sorted(files.items()):
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def provenance(root: Path) -> dict[str, Any]:
    """Return commit and difference of the checkout (null outside one), and what is installed beside the code."""
    return {
        "commit": git_says(root, PACKAGES, "rev-parse", "HEAD"),
        "diff": _shortened(checkout_difference(root, *PACKAGES) or ""),
        "python": platform.python_version(),
        "lock_hash": lock_hash(),
        "packages": installed_packages(),
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _place(sweep: Path, files: dict[Path, bytes]) -> Path:
    return (sweep / "code" / content_hash(files)).absolute()


def _contents(root: Path) -> dict[Path, bytes]:
    paths = [path for package in PACKAGES for path in (root / package).rglob("*")]
    return {
        path.relative_to(root): path.read_bytes()
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts
    }


def _shortened(diff: str) -> str:
    if len(diff) <= _LONGEST_DIFF:
        return diff
    return f"{diff[:_LONGEST_DIFF]}\n… cut: {len(diff):,} characters in all; the snapshot itself is whole"
