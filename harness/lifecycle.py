"""How a run begins, goes on and ends: the checks before anything is computed, and the files that say where it
stands.
"""

import json
import os

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from harness.config import SCIENCE_VERSION, MachineConfig, RunConfig
from harness.corpus import Corpus
from harness.halving import micro_batch_halvings
from harness.provenance import routing_table
from harness.record import RunFolder, Value, read_json, write_json

#: What must not change between a checkpoint and the resumption, for the sums to come out the same bit for bit.
SAME_ON_RESUME = (
    "run_id",
    "num_devices",
    "micro_batch_tokens",
    "accumulation",
    "threads",
    "compiled",
    "torch_version",
    "device",
)


def finished_status(files: RunFolder) -> str | None:
    """Return `finished` or `diverged` for a run that is over, else null."""
    status = read_json(files.run)["status"] if files.run.exists() else "running"
    return None if status == "running" else str(status)


def check_identity(run: RunConfig, corpus: Corpus) -> None:
    """Raise ValueError when the run would not be the one that its run_id names."""
    if run.science_version != SCIENCE_VERSION:
        raise ValueError(
            f"the run is of science_version {run.science_version}, this code is {SCIENCE_VERSION} and gives other "
            f"numbers; use the code of then, or plan the sweep again"
        )
    if run.corpus.fingerprint != corpus.fingerprint:
        raise ValueError(
            f"corpus.fingerprint is not in the configuration, so that its run_id does not name the text; "
            f"it is {corpus.fingerprint}"
        )
    if run.model.known_vocab_size < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size {run.model.known_vocab_size} is less than the {corpus.vocab_size} of the corpus; "
            f"raise it to that"
        )


def check_processes(machine: MachineConfig) -> None:
    """Raise ValueError unless there is one process for each device: Lightning would start the missing ones itself."""
    processes = int(os.environ["WORLD_SIZE"]) if TorchElasticEnvironment.detect() else 1
    if processes != machine.devices:
        raise ValueError(
            f"a run on {machine.devices} devices takes as many processes, here are {processes}; start it with "
            f"python -m torch.distributed.run --standalone --nproc_per_node={machine.devices} -m harness.train FOLDER"
        )


def start(files: RunFolder, run: RunConfig, machine: MachineConfig, row: dict[str, Value]) -> dict[str, Value]:
    """Write what is known at the start (rank 0), or check that a resumption computes the same sums; return the row."""
    if files.checkpoint.exists():
        if not files.run.exists():
            raise ValueError(
                f"{files.path}: {files.checkpoint.name} is there without the {files.run.name} that says how it was "
                f"made; remove it to train from the start"
            )
        before = read_json(files.run)
        for name in SAME_ON_RESUME:
            if before[name] != row[name]:
                raise ValueError(
                    f"{files.path}: the checkpoint was made with {name} {before[name]}, now it is {row[name]}; "
                    f"go on with the same, or remove {files.checkpoint.name} to train from the start"
                )
        row |= {"started_at": before["started_at"], "resumes": before["resumes"] + 1}
    row["micro_batch_halvings"] = micro_batch_halvings(files)
    if int(os.environ.get("RANK", "0")) == 0:
        files.path.mkdir(parents=True, exist_ok=True)
        for partial in files.path.glob(f"{files.checkpoint.name}.*"):  # of a process that was killed while it saved
            partial.unlink()
        resumed = files.run.exists()
        write_json(files.config, json.loads(run.model_dump_json()))
        write_json(files.machine, json.loads(machine.model_dump_json()))
        write_json(files.routing, {"tensors": (table := routing_table(run))})
        write_json(files.run, row)
        if not resumed:
            for tensor in table:
                print(*(f"{name} {value}" for name, value in tensor.items()), sep="  ", flush=True)
    return row


def finish(files: RunFolder, row: dict[str, Value]) -> None:
    """Write how the run ended; what served to go on with it is removed."""
    write_json(files.run, row)
    files.checkpoint.unlink(missing_ok=True)
    files.progress.unlink(missing_ok=True)
