"""Train one run, or go on with it: the only place that builds a Trainer.

`python -m harness.train FOLDER` trains the run whose config.json (and machine.json) lie in FOLDER; under
`python -m torch.distributed.run` it is one rank of a run on several devices.
"""

import gc
import logging
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from harness import STOPPED
from harness.batch_plan import RunPlan, plan_run
from harness.branches import kept_state
from harness.callbacks.accumulation import Accumulation
from harness.callbacks.averaging import WeightAverage
from harness.callbacks.clocks import Clocks
from harness.callbacks.diagnostics.diagnostics import Diagnostics
from harness.callbacks.diagnostics.gradient_noise import GradientNoise
from harness.callbacks.diagnostics.groups import groups_of
from harness.callbacks.evaluation import Evaluation
from harness.callbacks.interruption import AtomicCheckpointIO, Checkpoints, Interrupted
from harness.callbacks.probe import UpdateProbe
from harness.callbacks.progress import Progress
from harness.config import MachineConfig, RunConfig
from harness.corpus import Corpus, check_budget, prepare
from harness.data import TokenStream, validation_batches
from harness.failures import is_out_of_memory, kind_of, reading_the_corpus, reason_of, write_failure
from harness.halving import StartAnew, micro_batch_halvings, start_smaller, within_memory
from harness.lifecycle import check_identity, finish, finished_status, start, state_to_start_from
from harness.module import LanguageModel
from harness.processes import check_processes, environment, num_nodes
from harness.provenance import describe_run, uses_gpu
from harness.record import RunFolder, Value, read_json
from harness.schedule import evaluation_marks
from harness.strategy import strategy


def train(run: RunConfig, machine: MachineConfig, folder: Path, corpus_cache: Path | None = None) -> str:
    """Train `run` in `folder` from its checkpoint if there is one; return its status, `finished` or `diverged`.

    Memory that runs out before the first checkpoint starts the run anew with half the micro-batch.

    Raises: ValueError when the batch split or the resumption does not fit, DataError when the corpus does not;
    TooLargeError when no smaller micro-batch may be tried; StartAnew when one may, but every process of the run has to
    start for it; Interrupted when a signal came (after a checkpoint: calling again goes on).
    """
    started = time.perf_counter()
    files = RunFolder(folder)
    if (status := finished_status(files)) is not None:
        return status
    check_processes(machine)
    with reading_the_corpus():
        corpus = prepare(run.corpus, corpus_cache)
        check_budget(corpus, run)
    check_identity(run, corpus)
    if run.branch and not files.checkpoint.exists():
        kept_state(run, files)  # before anything is written
    torch.set_num_threads(machine.threads or torch.get_num_threads())
    while (status := _attempt(run, within_memory(machine, files), corpus, files, started)) is None:
        gc.collect()  # what the failed attempt left on the device
        torch.cuda.empty_cache()
    return status


def _attempt(run: RunConfig, machine: MachineConfig, corpus: Corpus, files: RunFolder, started: float) -> str | None:
    """Train to the end; null when memory ran out and the run is to start anew with half the micro-batch."""
    limit, sequence_length = machine.max_micro_batch_tokens, run.model.sequence_length
    plan = plan_run(run.clock, sequence_length, machine.devices, limit)
    row = start(files, run, machine, describe_run(run, machine, plan, corpus))
    try:
        return _train(run, machine, plan, corpus, files, row, Clocks(started, machine.compile))
    except Exception as error:
        if is_out_of_memory(error):
            print(start_smaller(files, row), flush=True)
        elif micro_batch_halvings(files) == row["micro_batch_halvings"]:
            raise  # else another process ran out of memory, and this one lost its connection to it
        if machine.devices > 1:
            raise StartAnew from error
    return None


def _train(
    run: RunConfig,
    machine: MachineConfig,
    plan: RunPlan,
    corpus: Corpus,
    files: RunFolder,
    row: dict[str, Value],
    clocks: Clocks,
) -> str:
    with reading_the_corpus():
        validation = validation_batches(corpus, run, machine.max_micro_batch_tokens // run.model.sequence_length)
    evaluation, callbacks = _callbacks(files, run, machine, plan, validation, clocks)
    module, trainer = build(run, machine, plan, callbacks)
    state = state_to_start_from(files, run)
    trainer.fit(module, datamodule=TokenStream(corpus, run, plan), ckpt_path=state, weights_only=True)

    outcome = _outcome(run, trainer.global_step, evaluation.stop_reason)
    clocks.switch("other")
    if trainer.is_global_zero:
        finish(files, row | outcome | {f"{clock}_seconds": value for clock, value in clocks.seconds.items()})
    return str(outcome["status"])


def build(
    run: RunConfig, machine: MachineConfig, plan: RunPlan, callbacks: list[pl.Callback]
) -> tuple[LanguageModel, pl.Trainer]:
    """Build the module, compiled if asked to, and a Trainer that does nothing but train it and call back."""
    _quieten()
    module = LanguageModel(run)
    if machine.compile:
        module.network.compile(dynamic=False)
    trainer = _trainer(run, machine, [Accumulation(plan), *callbacks])
    _leave_sigterm_alone(trainer)
    return module, trainer


def _callbacks(
    files: RunFolder, run: RunConfig, machine: MachineConfig, plan: RunPlan, validation: list[Tensor], clocks: Clocks
) -> tuple[Evaluation, list[pl.Callback]]:
    """Return the callbacks in the order in which they act at a step's end: average, evaluate, show, save."""
    marks = evaluation_marks(run.evaluation, run.clock, run.first_step)
    probe = UpdateProbe(set(marks))
    average = None if run.averaging.kind == "none" else WeightAverage()
    evaluation = Evaluation(files, marks, plan, validation, clocks, probe, average)
    kept = {run.clock.steps_within(tokens): files.kept(tokens) for tokens in run.keep_at_tokens}
    checkpoints = Checkpoints(files.checkpoint, machine.checkpoint_every_seconds, clocks, kept)
    averaging = [average] if average else []
    measuring = _diagnostics(files, run, marks, validation, clocks)
    return evaluation, [clocks, probe, *averaging, evaluation, *measuring, Progress(files), checkpoints]


def _diagnostics(
    files: RunFolder, run: RunConfig, marks: list[int], validation: list[Tensor], clocks: Clocks
) -> list[pl.Callback]:
    """Return the callbacks that measure what the run asks for: at every so many marks, counted from the last."""
    asked = run.diagnostics
    if not (asked.noise_scale or asked.any_of_updates):
        return []
    chosen = [mark for mark in marks[:: -asked.every_marks] if mark > run.first_step]
    noise = GradientNoise(groups_of(run.model), chosen, clocks) if asked.noise_scale else None
    measuring = Diagnostics(files, run, chosen, validation, clocks, noise)
    return [noise, measuring] if noise else [measuring]


def _outcome(run: RunConfig, step: int, stop_reason: str | None) -> dict[str, Value]:
    """Return how the run ended; a run that says it used its budget must have used it to the token."""
    tokens_seen = run.clock.tokens_after(step)
    assert stop_reason is not None, "the run ended before its budget without saying why"
    assert stop_reason != "budget" or tokens_seen == run.realized_tokens, (tokens_seen, run.realized_tokens)
    status = "finished" if stop_reason in ("budget", "target") else "diverged"
    return {"status": status, "stop_reason": stop_reason, "step": step, "tokens_seen": tokens_seen}


def _trainer(run: RunConfig, machine: MachineConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Build a Trainer that does nothing but train: what it would log, save or show is ours, at step boundaries."""
    return pl.Trainer(
        accelerator="gpu" if uses_gpu(machine) else "cpu",
        devices=machine.devices // num_nodes(),
        num_nodes=num_nodes(),
        strategy=strategy(machine),
        precision="32-true" if run.precision == "fp32" else "bf16-mixed",
        max_steps=run.steps,
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), environment()],
    )


def _leave_sigterm_alone(trainer: pl.Trainer) -> None:
    """Keep Lightning from handling signals: `Checkpoints` does.

    Its handler of SIGTERM loses the run and leaves with status 0; the flag that it sends around the ranks every
    micro-batch takes time (Lightning issue 21487).
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
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
    warnings.filterwarnings("ignore", message=".*srun.*command is available.*")


def main() -> int:
    """Train the run of the folder named on the command line; say in its failure.json why it failed, unless another of
    its processes has.
    """
    files = RunFolder(Path(sys.argv[1]))
    try:
        machine = read_json(files.machine) if files.machine.exists() else {}
        run = RunConfig.parse(read_json(files.config), str(files.config))
        print(train(run, MachineConfig.parse(machine, str(files.machine)), files.path))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    except StartAnew:
        return 1  # whoever started the processes sees in the record that it should again
    except Exception as error:
        traceback.print_exc()
        with suppress(OSError):  # the disk may be full
            if not files.failure.exists():
                write_failure(files, reason_of(error), kind_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
