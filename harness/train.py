"""Train one run, or go on with it: the only place that builds a Trainer.

`python -m harness.train FOLDER` trains the run whose config.json (and machine.json) lie in FOLDER; under
`python -m torch.distributed.run` it is one rank of a run on several devices.
"""

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from harness.batch_plan import BatchPlan, plan_batch
from harness.callbacks.averaging import WeightAverage
from harness.callbacks.clocks import Clocks
from harness.callbacks.evaluation import Evaluation
from harness.callbacks.interruption import AtomicCheckpointIO, Checkpoints, Interrupted
from harness.callbacks.probe import UpdateProbe
from harness.callbacks.progress import Progress
from harness.config import SCIENCE_VERSION, MachineConfig, RunConfig
from harness.corpus import Corpus, check_budget, prepare
from harness.data import TokenStream, validation_batches
from harness.module import LanguageModel
from harness.provenance import describe_run, routing_table, uses_gpu
from harness.record import RunFolder, Value, read_json, write_json
from harness.schedule import evaluation_marks

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

#: Exit status of a run that a signal stopped after its checkpoint (sysexits.h: try again later).
STOPPED = 75


def train(run: RunConfig, machine: MachineConfig, folder: Path, corpus_cache: Path | None = None) -> str:
    """Train `run` in `folder` from its checkpoint if there is one; return its status, `finished` or `diverged`.

    Raises: ValueError when the corpus, the batch split or the resumption does not fit; Interrupted when a signal came
    (after a checkpoint: calling again goes on).
    """
    clocks = Clocks(time.perf_counter(), machine.compile)
    _quieten()
    files = RunFolder(folder)
    if (status := finished_status(files)) is not None:
        return status
    _check_processes(machine)
    plan = plan_batch(
        run.global_batch_tokens, run.model.sequence_length, machine.devices, machine.max_micro_batch_tokens
    )
    corpus = prepare(run.corpus, corpus_cache)
    _check_identity(run, corpus)
    check_budget(corpus, run)
    torch.set_num_threads(machine.threads or torch.get_num_threads())
    row = _start(files, run, machine, describe_run(run, machine, plan, corpus))

    module = LanguageModel(run)
    if machine.compile:
        module.network.compile()
    average = None if run.averaging.kind == "none" else WeightAverage()
    marks = evaluation_marks(run.evaluation, run.global_batch_tokens, run.steps)
    probe = UpdateProbe(set(marks))
    validation = validation_batches(corpus, run, machine.max_micro_batch_tokens // run.model.sequence_length)
    evaluation = Evaluation(files, marks, validation, clocks, probe, average)
    checkpoints = Checkpoints(files.checkpoint, machine.checkpoint_every_seconds, clocks)
    averaging = [average] if average else []
    trainer = _trainer(run, machine, plan, [clocks, probe, *averaging, evaluation, Progress(files), checkpoints])
    _leave_sigterm_alone(trainer)
    resume = files.checkpoint if files.checkpoint.exists() else None
    trainer.fit(module, datamodule=TokenStream(corpus, run, plan), ckpt_path=resume, weights_only=True)

    assert evaluation.stop_reason is not None, "the run ended before its budget without saying why"
    tokens_seen = trainer.global_step * run.global_batch_tokens
    assert evaluation.stop_reason != "budget" or tokens_seen == run.realized_tokens, (tokens_seen, run.realized_tokens)
    status = "finished" if evaluation.stop_reason in ("budget", "target") else "diverged"
    if trainer.is_global_zero:
        clocks.switch("other")
        _finish(
            files, row | {"status": status, "stop_reason": evaluation.stop_reason, "step": trainer.global_step}, clocks
        )
    return status


def finished_status(files: RunFolder) -> str | None:
    """Return `finished` or `diverged` for a run that is over, else null."""
    status = read_json(files.run)["status"] if files.run.exists() else "running"
    return None if status == "running" else str(status)


def _check_identity(run: RunConfig, corpus: Corpus) -> None:
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


def _check_processes(machine: MachineConfig) -> None:
    """Raise ValueError unless there is one process for each device: Lightning would start the missing ones itself."""
    processes = int(os.environ["WORLD_SIZE"]) if TorchElasticEnvironment.detect() else 1
    if processes != machine.devices:
        raise ValueError(
            f"a run on {machine.devices} devices takes as many processes, here are {processes}; start it with "
            f"python -m torch.distributed.run --standalone --nproc_per_node={machine.devices} -m harness.train FOLDER"
        )


def _start(files: RunFolder, run: RunConfig, machine: MachineConfig, row: dict[str, Value]) -> dict[str, Value]:
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
    if int(os.environ.get("RANK", "0")) == 0:
        files.path.mkdir(parents=True, exist_ok=True)
        for partial in files.path.glob(f"{files.checkpoint.name}.*"):  # of a process that was killed while it saved
            partial.unlink()
        write_json(files.config, json.loads(run.model_dump_json()))
        write_json(files.machine, json.loads(machine.model_dump_json()))
        write_json(files.routing, {"tensors": (table := routing_table(run))})
        write_json(files.run, row)
        for tensor in table:
            print(*(f"{name} {value}" for name, value in tensor.items()), sep="  ", flush=True)
    return row


def _finish(files: RunFolder, row: dict[str, Value], clocks: Clocks) -> None:
    assert isinstance(row["step"], int)
    assert isinstance(row["global_batch_tokens"], int)
    seconds: dict[str, Value] = {f"{clock}_seconds": value for clock, value in clocks.seconds.items()}
    write_json(files.run, row | seconds | {"tokens_seen": row["step"] * row["global_batch_tokens"]})
    files.checkpoint.unlink(missing_ok=True)
    files.progress.unlink(missing_ok=True)


def _trainer(run: RunConfig, machine: MachineConfig, plan: BatchPlan, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Build a Trainer that does nothing but train: what it would log, save or show is ours, at step boundaries."""
    return pl.Trainer(
        accelerator="gpu" if uses_gpu(machine) else "cpu",
        devices=machine.devices,
        strategy=_strategy(machine),
        precision="32-true" if run.precision == "fp32" else "bf16-mixed",
        max_steps=run.steps,
        max_epochs=1,
        accumulate_grad_batches=plan.accumulation,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), _environment()],
    )


def _strategy(machine: MachineConfig) -> Strategy:
    if machine.devices > 1:
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return SingleDeviceStrategy(torch.device("cuda", 0) if uses_gpu(machine) else torch.device("cpu"))


def _environment() -> ClusterEnvironment:
    """Name the environment: Lightning would guess Slurm from its variables and take signals and ranks from it."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()


def _leave_sigterm_alone(trainer: pl.Trainer) -> None:
    """Drop the flag that Lightning sends around the ranks every micro-batch (upstream issue 21487); `Checkpoints` has
    its own.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None


def _quieten() -> None:
    """Silence what Lightning says for people who write their own loops."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # the stream is a pure function of the step, so its loader has no state to restore
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")


def main() -> int:
    """Train the run of the folder named on the command line."""
    files = RunFolder(Path(sys.argv[1]))
    machine = read_json(files.machine) if files.machine.exists() else {}
    run = RunConfig.parse(read_json(files.config), str(files.config))
    try:
        print(train(run, MachineConfig.parse(machine, str(files.machine)), files.path))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
