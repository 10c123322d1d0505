"""Commands named as Slurm's, on the PATH, that note how they were called: for what needs no real one."""

from pathlib import Path

import pytest

_SCRIPTS = {
    "sbatch": """
count=$(grep -c . "$here/sbatch.calls")
cp "$1" "$here/script.$count"
[ -e "$here/refuses" ] && { echo "sbatch: error: $(cat "$here/refuses")" >&2; exit 1; }
echo "Submitted batch job $((1000 + count))"
""",
    "squeue": """
[ -e "$here/down" ] && { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
cat "$here/squeue.says"
""",
    "sacct": 'cat "$here/sacct.says"\n',
    "scontrol": '[ -e "$here/scontrol.says" ] && { cat "$here/scontrol.says" >&2; exit 1; }\nexit 0\n',
    "scancel": "",
    "srun": "",
}


class StandIn:
    """The folder of the stand-in commands, and of their notes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for name, script in _SCRIPTS.items():
            head = f'#!/bin/bash\nhere={folder}\necho "$@" >> "$here/{name}.calls"\n'
            (folder / name).write_text(head + script)
            (folder / name).chmod(0o755)
            (folder / f"{name}.says").touch()
        (folder / "scontrol.says").unlink()
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    def calls(self, command: str) -> list[str]:
        """Return the arguments of every call so far."""
        path = self.folder / f"{command}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def says(self, command: str, text: str) -> None:
        """Let a command print something from now on."""
        (self.folder / f"{command}.says").write_text(text)

    def script(self, number: int) -> str:
        """Return the script of one call of sbatch, the first being 1."""
        return (self.folder / f"script.{number}").read_text()

    def runs(self, *tasks: str, state: str = "RUNNING") -> None:
        """Let squeue know these tasks, all in one state."""
        self.says("squeue", "".join(f"{task}|{state}|n1|0|None|\n" for task in tasks))
