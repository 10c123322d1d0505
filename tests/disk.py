"""A disk of its own for a test: that fills up, or that nobody may write."""

import os
import subprocess
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, whose size and mode can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=64m", "disk", str(path)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            lacking = pytest.fail if os.environ.get("CRITBATCH_REQUIRE_SLURM") else pytest.skip
            lacking("no right to mount a disk (root has it on Linux): stand-ins are tested alone")

    def change(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.path)], check=True)

    def fill(self, room_bytes: int = 0) -> None:
        """Leave only so much room beside what is there."""
        now = os.statvfs(self.path)
        self.change(f"size={(now.f_blocks - now.f_bfree) * now.f_frsize + room_bytes}")

    def unmount(self) -> None:
        """Take the disk away, also from a process that still has a file open on it."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
