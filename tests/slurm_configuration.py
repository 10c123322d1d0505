"""The configuration of a Slurm on one machine: no systemd, no cgroups, loopback only, quick reactions."""

import os
import pwd
import random
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

CPUS_PER_NODE = 8
GPUS_PER_NODE = 8
GRACE_SECONDS = 20  # of the partition low: between a preempted job's own signal and its end
PORTS = range(20_000, 32_000)  # below those that the kernel hands out to clients


def configuration_files(folder: Path, nodes: Sequence[str], ports: Sequence[int]) -> dict[str, str]:
    """Return the text of Slurm's configuration files by name.

    Ports: one for slurmctld, one for slurmdbd, one for each node.
    """
    controller_port, accounting_port, *node_ports = ports
    node_lines = "\n".join(
        f"NodeName={name} NodeHostname={host()} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} "
        f"RealMemory=512000 Gres=gpu:{GPUS_PER_NODE}"
        for name, port in zip(nodes, node_ports, strict=True)
    )
    common = f"""
AuthType=auth/munge
SlurmUser={user()}
"""
    slurm = f"""{common}
ClusterName=critbatch
SlurmctldHost={host()}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdUser={user()}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
# cred_expire: also the wait of a requeued job (default 120 s)
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
# submitit finds a job's files by its number alone: numbers must not come again
FirstJobId={int(time.time()) % 60_000_000 + 1}

StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/run/%n.pid
SlurmdLogFile={folder}/log/%n.log

# no cgroups, no mail, no limits carried over; more CPUs and memory than there are
ProctrackType=proctrack/linuxproc
PropagateResourceLimits=NONE
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
MaxArraySize=10001
MaxJobCount=20000

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageTRES=gres/gpu

# preempt_send_user_signal: without it a preempted job gets SIGTERM alone, and never checkpoints
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1

# quick reactions; slurmctld looks at time limits every 30 s all the same
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=1
PriorityType=priority/basic
KillWait=5
SlurmdTimeout=15
ReturnToService=2

{node_lines}
PartitionName=main Nodes=ALL PriorityTier=10 PreemptMode=OFF Default=YES
PartitionName=high Nodes=ALL PriorityTier=20 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE_SECONDS}
PartitionName=lownograce Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
"""
    slurmdbd = f"""{common}
AuthInfo=socket={folder}/run/munge.socket
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting_port}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""
    gpus = f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-{GPUS_PER_NODE - 1}]\n"
    return {"slurm.conf": slurm, "slurmdbd.conf": slurmdbd, "gres.conf": gpus}


def free_ports(count: int) -> tuple[int, ...]:
    """Return ports on loopback that nobody listens on at this moment."""
    found: list[int] = []
    with ExitStack() as held:
        for port in random.sample(PORTS, len(PORTS)):
            trial = held.enter_context(socket.socket())
            with suppress(OSError):
                trial.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return tuple(found)
    raise OSError(f"{count} free ports wanted, {len(found)} found between {PORTS.start} and {PORTS.stop}")


def listens(port: int) -> bool:
    """Tell whether anybody listens on a port on loopback."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def user() -> str:
    """Return the name of the user that this process belongs to."""
    return pwd.getpwuid(os.getuid()).pw_name


def host() -> str:
    """Return this machine's name as Slurm compares it."""
    return socket.gethostname().split(".")[0]
