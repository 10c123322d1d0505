"""Which process of a run this is: the variables that torchrun sets, and every launcher of ours."""

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from harness.config import MachineConfig


def is_first() -> bool:
    """Tell whether this is the process that writes the record."""
    return os.environ.get("RANK", "0") == "0"


def num_nodes() -> int:
    """Return over how many nodes the processes of this run are spread."""
    return _variable("WORLD_SIZE") // _variable("LOCAL_WORLD_SIZE")


def environment() -> ClusterEnvironment:
    """Name the environment: Lightning would guess Slurm from its variables and take signals and ranks from it."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()


def check_processes(machine: MachineConfig) -> None:
    """Raise ValueError unless there is one process for each device (Lightning would start the missing ones itself), and
    as many on every node.
    """
    processes, on_this_node = _variable("WORLD_SIZE"), _variable("LOCAL_WORLD_SIZE")
    if processes != machine.devices:
        raise ValueError(
            f"a run on {machine.devices} devices takes as many processes, here are {processes}; start it with "
            f"python -m torch.distributed.run --standalone --nproc_per_node={machine.devices} -m harness.train FOLDER"
        )
    if processes % on_this_node:
        raise ValueError(
            f"{processes} processes with {on_this_node} on a node are not as many on every node; use a divisor of "
            f"{processes} as the number of devices on a node"
        )


def _variable(name: str) -> int:
    """Return a number that the launcher has set; of a process that was not launched, 1."""
    return int(os.environ[name]) if TorchElasticEnvironment.detect() else 1
