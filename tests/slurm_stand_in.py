"""Commands named as Slurm's, on the PATH, that note how they were called: for what needs no real one."""

from pathlib import Path

import pytest

_SCRIPTS = {
    "sbatch": """
count=$(grep -c . "$here/sbatch.calls")
cp "$1" "$here/script.$count"
[ -e "$here/refuses" ] && { echo "sbatch: error: $(cat "$here/refuses")" >&2; exit 1; }
[ "$count" -gt "$(cat "$here/room" 2>&- || echo "$count")" ] && { echo "sbatch: error: too many jobs" >&2; exit 1; }
[ -e "$here/interrupts" ] && kill $(cat "$here/interrupts") $$
echo "Submitted batch job $((1000 + count))"
""",
    "squeue": """
[ -e "$here/down" ] && { echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }
cat "$here/squeue.says"
""",
    "sacct": 'cat "$here/sacct.says"\n',
    "scontrol": """
[ "$1 $2" = "show config" ] && { cat "$here/cluster" 2>&-; exit; }
[ -e "$here/scontrol.says" ] && { cat "$here/scontrol.says" >&2; exit 1; }
exit 0
""",
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

    def is_cluster(self, name: str) -> None:
        """Let it be the cluster of this name from now on."""
        (self.folder / "cluster").write_text(f"Configuration data\nClusterName             = {name}\n")

    def becomes_full(self, after: int) -> None:
        """Let sbatch refuse every call after so many."""
        (self.folder / "room").write_text(str(after))

    def interrupts(self, process: int, number: int) -> None:
        """Let sbatch signal a process, and itself, once it has the job and before it says so."""
        (self.folder / "interrupts").write_text(f"-{number} {process}")

    def script(self, number: int) -> str:
        """Return the script of one call of sbatch, the first being 1."""
        return (self.folder / f"script.{number}").read_text()

    def runs(self, *tasks: str, state: str = "RUNNING") -> None:
        """Let squeue know these tasks, all in one state."""
        self.says("squeue", "".join(f"{task}|{state}|n1|0|None|\n" for task in tasks))
