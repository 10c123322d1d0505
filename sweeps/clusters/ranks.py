"""The processes of a run on several devices, as tasks of one Slurm step; torchrun's place under Slurm.

`python -m sweeps.clusters.ranks DEVICES FOLDER`, inside a job, starts `DEVICES` of them with srun on the job's nodes.
Each sets what torch's rendezvous asks for, then trains the run of FOLDER.
"""

import os
import signal
import socket
import subprocess
import sys
from types import FrameType

_MODULE = "sweeps.clusters.ranks"
_PORT = "CRITBATCH_MASTER_PORT"


def start(devices: str, folder: str) -> int:
    """Run the step and return its exit status. SIGTERM becomes SIGUSR2: of SIGTERM, srun would kill the step."""
    command = ["srun", f"--ntasks={devices}", "--kill-on-bad-exit=1", "--unbuffered"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        command.append(f"--cpus-per-task={cpus}")
    environment = os.environ | {_PORT: str(_free_port())}
    step = subprocess.Popen([*command, sys.executable, "-m", _MODULE, folder], env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        del number, frame
        step.send_signal(signal.SIGUSR2)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, pass_on)
    return step.wait()


def become_rank() -> None:
    """Say to torch and Lightning, in torchrun's words, which process of how many this one is."""
    slurm = os.environ
    os.environ |= {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": str(int(slurm["SLURM_NTASKS"]) // int(slurm["SLURM_NNODES"])),
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or slurm["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": slurm[_PORT],
        "TORCHELASTIC_RUN_ID": slurm["SLURM_JOB_ID"],
    }


def _free_port() -> int:
    """Return a port of this node, where the first of the processes will run, that nobody listens on."""
    with socket.socket() as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])


def main() -> int:
    if len(sys.argv) == 3:
        return start(*sys.argv[1:])
    become_rank()
    from harness.train import main as train

    return train()


if __name__ == "__main__":
    sys.exit(main())
