"""The files of a run and of a sweep; imports no torch.

A run writes its own folder and nothing else. A file is complete before it has its name: it is written under a temporary
name beside it, synchronised, then renamed. `evaluations.jsonl` and `starts.jsonl` grow, a line at a time; a torn last
row of evaluations is dropped.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.frozen import Frozen

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Column:
    """One column of a table: its type, its unit (empty for names and counts) and what it means."""

    type: type
    unit: str
    meaning: str


EVALUATION_COLUMNS: dict[str, Column] = {
    "run_id": Column(str, "", "the run"),
    "step": Column(int, "steps", "optimizer steps done; the first row is the untrained model, or a branch's start"),
    "tokens_seen": Column(int, "tokens", "training tokens consumed in these steps, a branch's parent's included"),
    "train_flops": Column(float, "FLOP", "forward, backward and optimizer by flops_convention; of a branch its own"),
    "train_seconds": Column(float, "s", "time in optimizer steps, forward and backward included; of a branch its own"),
    "train_cpu_seconds": Column(
        float, "s", "processor time of the process inside optimizer steps, all its threads; null on a GPU"
    ),
    "eval_seconds": Column(float, "s", "time inside evaluations"),
    "other_seconds": Column(float, "s", "start-up, compilation and checkpoints"),
    "learning_rate": Column(float, "", "scheduled learning rate of the last step, before any lr_multiplier"),
    "train_loss_nats": Column(float, "nats/token", "mean training loss since the previous row, on fresh batches"),
    "val_loss_nats": Column(float, "nats/token", "validation loss of the raw weights"),
    "val_loss_averaged_nats": Column(
        float, "nats/token", "validation loss of the averaged weights; null without averaging"
    ),
    "grad_norm": Column(float, "", "L2 norm of the whole gradient at the last step, before clipping"),
    "update_rms_matrices": Column(float, "", "root mean square change of a hidden-matrix weight in the last step"),
    "update_rms_rest": Column(float, "", "the same for embedding, head and norms"),
}

#: A row for each quantity and group of layers at each mark; results/README.md lists the quantities.
DIAGNOSTIC_COLUMNS: dict[str, Column] = {
    **{name: EVALUATION_COLUMNS[name] for name in ("run_id", "step", "tokens_seen")},
    "quantity": Column(str, "", "what was measured"),
    "group": Column(str, "", "layers it was measured on: all, hidden, embedding, head, norm, or one kind of matrix"),
    "value": Column(float, "", "the measurement; for noise scales the estimate, in tokens"),
    "reason": Column(str, "", "why there is no value; null where there is one"),
    "num_steps": Column(int, "steps", "of a noise scale: steps since the last mark that it averages over"),
    "small_batch_tokens": Column(float, "tokens", "of a noise scale: the smaller batch of its last step"),
    "big_batch_tokens": Column(float, "tokens", "of a noise scale: the larger one"),
    "signal": Column(float, "", "mean over these steps of the unbiased estimate of |G|²"),
    "noise": Column(float, "tokens", "mean over these steps of the unbiased estimate of tr Σ of one token"),
    "signal_variance": Column(float, "", "variance of the first over these steps; null for one step"),
    "noise_variance": Column(float, "tokens²", "variance of the second"),
    "signal_noise_covariance": Column(float, "tokens", "their covariance"),
}

RUN_COLUMNS: dict[str, Column] = {
    "run_id": Column(str, "", "name and hash of the resolved scientific configuration"),
    "model": Column(str, "", "model preset, or d<width>l<layers>"),
    "optimizer": Column(str, "", "optimizer of the hidden matrices"),
    "global_batch_tokens": Column(int, "tokens", "tokens per optimizer step, over all devices; after batch_warmup"),
    "token_budget": Column(int, "tokens", "tokens asked for"),
    "realized_tokens": Column(int, "tokens", "tokens that whole steps of the budget give"),
    "peak_lr": Column(float, "", "learning rate after warmup"),
    "weight_decay": Column(float, "", "decoupled weight decay, multiplied by the learning rate"),
    "warmup_tokens": Column(int, "tokens", "warmup as it was run: whole steps, floor included"),
    "schedule": Column(str, "", "learning-rate schedule after warmup"),
    "averaging": Column(str, "", "kind of weight averaging"),
    "protocol": Column(str, "", "how losses of this curve may be matched to tokens"),
    "init_seed": Column(int, "", "seed of the initial weights"),
    "data_seed": Column(int, "", "seed of the order of the training data"),
    "precision": Column(str, "", "fp32 or bf16 autocast"),
    "sequence_length": Column(int, "tokens", "context"),
    "vocab_size": Column(int, "", "symbols of the tokenizer"),
    "corpus": Column(str, "", "source of the text"),
    "bytes_per_token": Column(
        float, "bytes", "mean length of a validation token; null where the source came as tokens"
    ),
    "corpus_fingerprint": Column(str, "", "hash of tokens and split"),
    "science_version": Column(int, "", "version of the code that changes numbers"),
    "num_params": Column(int, "", "all parameters"),
    "num_params_nonembedding": Column(int, "", "without embedding and head"),
    "flops_per_token": Column(float, "FLOP/token", "forward and backward"),
    "optimizer_flops_per_step": Column(float, "FLOP/step", "matrix products of the optimizer"),
    "flops_convention": Column(str, "", "what flops_per_token counts"),
    "routing": Column(str, "", "weights by the algorithm that updates them; tensor by tensor in routing.json"),
    "device": Column(str, "", "processor or accelerator"),
    "host": Column(str, "", "machine of the latest start"),
    "job_id": Column(str, "", "Slurm job of the latest start, with its array task; null outside Slurm"),
    "driver": Column(str, "", "version of the NVIDIA driver; null on a processor"),
    "cuda_version": Column(str, "", "CUDA that PyTorch was built with; null on a processor"),
    "num_devices": Column(int, "", "devices of the run"),
    "micro_batch_tokens": Column(int, "tokens", "tokens per device and forward pass, as run; the largest of several"),
    "accumulation": Column(int, "", "micro-batches per device and step; after batch_warmup"),
    "micro_batch_halvings": Column(int, "", "how often the run started anew with half the micro-batch, out of memory"),
    "threads": Column(int, "", "threads per process"),
    "compiled": Column(bool, "", "whether torch.compile was used"),
    "python_version": Column(str, "", "version of the interpreter"),
    "torch_version": Column(str, "", "version of PyTorch"),
    "lightning_version": Column(str, "", "version of Lightning"),
    "code_commit": Column(str, "", "git commit of the code, with + for local changes; null outside a checkout"),
    "code_snapshot": Column(str, "", "hash of the copy of the code that was queued; null when run from elsewhere"),
    "lock_hash": Column(str, "", "hash of the versions of all installed packages"),
    "started_at": Column(str, "", "UTC time of the first start"),
    "status": Column(str, "", "running, finished, diverged"),
    "stop_reason": Column(
        str, "", "budget, target, non_finite_loss, loss_above_start, trunk_diverged; null while running"
    ),
    "step": Column(int, "steps", "optimizer steps done at the end; null while running"),
    "tokens_seen": Column(int, "tokens", "tokens consumed at the end; null while running"),
    "train_seconds": Column(float, "s", "as in the evaluations, at the end"),
    "eval_seconds": Column(float, "s", "as in the evaluations, at the end"),
    "other_seconds": Column(float, "s", "as in the evaluations, at the end"),
    "resumes": Column(int, "", "how often the run was taken up again from a checkpoint"),
    "parent_run_id": Column(str, "", "run from whose state a branch starts; null without one"),
    "branch_tokens": Column(int, "tokens", "tokens seen at that state; null without one"),
    "config_json": Column(str, "", "the whole RunConfig"),
}

#: In a sweep's folder, {"rows": [...]}.
TIMINGS_JSON = "timings.json"

#: A row of it: one micro-batch and one optimizer step, timed with nothing beside them.
TIMING_COLUMNS: dict[str, Column] = {
    "run_id": Column(str, "", "a run of the sweep that was timed: its model and optimizer at this micro-batch"),
    **{name: RUN_COLUMNS[name] for name in ("model", "optimizer", "device", "threads", "precision")},
    "micro_batch_tokens": RUN_COLUMNS["micro_batch_tokens"],
    "micro_batch_seconds": Column(float, "s", "reading, forward and backward of one micro-batch, median"),
    "optimizer_seconds": Column(float, "s", "clipping, optimizer and averaging of one step, median"),
    "matrix_seconds": Column(
        float, "s", "updates of all matrices within it, of which each of several devices does a share"
    ),
    "repeats": Column(int, "", "steps that were timed"),
    "spread": Column(float, "", "quartile range of the seconds of a step over their median"),
    "cpu_share": Column(float, "", "processor seconds over threads × seconds; null on a GPU"),
}


_IN_EVERY_ROW = {"run_id", "step", "tokens_seen"}


class PlannedRun(Frozen):
    """A run of a sweep, and the stage that asked for it: the grid, or fresh seeds at a chosen rate."""

    run_id: str
    stage: Literal["grid", "confirm"] = "grid"


class SweepManifest(Frozen):
    """What an analysis needs to know of a sweep beside its runs; `sweep.json` in the sweep's folder.

    `tuned`: settings (`optimizer.weight_decay`) that are tuned beside the learning rate.
    """

    name: str
    description: str = ""
    baseline: str
    targets_nats: tuple[float, ...]
    runs: tuple[PlannedRun, ...]
    tuned: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """The places of one run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """The RunConfig, as JSON."""
        return self.path / "config.json"

    @property
    def machine(self) -> Path:
        """The MachineConfig that the run was last started with, as JSON."""
        return self.path / "machine.json"

    @property
    def run(self) -> Path:
        """One flat row of RUN_COLUMNS: written at the start, completed at the end."""
        return self.path / "run.json"

    @property
    def routing(self) -> Path:
        """Which algorithm updates each tensor, at which multiple of the rate, with which weight decay, as JSON."""
        return self.path / "routing.json"

    @property
    def starts(self) -> Path:
        """A line for each start, as JSON: where, with which code (commit and difference), packages and driver."""
        return self.path / "starts.jsonl"

    @property
    def evaluations(self) -> Path:
        """One row of EVALUATION_COLUMNS a line."""
        return self.path / "evaluations.jsonl"

    @property
    def diagnostics(self) -> Path:
        """One row of DIAGNOSTIC_COLUMNS a line; missing where the run measures none."""
        return self.path / "diagnostics.jsonl"

    @property
    def progress(self) -> Path:
        """step, tokens_seen, tokens_per_second: rewritten about once a second."""
        return self.path / "progress.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.ckpt"

    def kept(self, tokens: int) -> Path:
        """The state after `tokens` tokens, for branches to start from; it stays when the run has finished."""
        return self.path / f"kept-{tokens}.ckpt"

    @property
    def claim(self) -> Path:
        """Locked (flock) by the process that trains the run, for as long as it lives."""
        return self.path / "claim"

    @property
    def failure(self) -> Path:
        """Why a run failed (reason, kind, host, job, last lines), as JSON; removed when it is tried again."""
        return self.path / "failure.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"


def write_json(path: Path, content: Mapping[str, Any], durable: bool = True) -> None:
    """Write `content` so that `path` is either the old file or the whole new one. NaN and infinity are refused."""
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n", durable)


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write under a temporary name in the same folder and rename; `durable` synchronises, to outlive a power cut
    too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read an object. Raises ValueError naming the file when it is truncated or no object."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); remove it to run this run again") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object, found {type(content).__name__}; remove it to run this run again"
        )
    return content


def append_row(path: Path, row: Mapping[str, Value]) -> None:
    """Append one evaluation; its columns must be EVALUATION_COLUMNS exactly, missing values null."""
    assert row.keys() == EVALUATION_COLUMNS.keys(), set(row) ^ set(EVALUATION_COLUMNS)
    append_line(path, row)


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append an object as a line of JSON, synchronised. NaN and infinity are refused."""
    append_lines(path, [content])


def append_lines(path: Path, contents: Iterable[Mapping[str, Any]]) -> None:
    """Append objects, a line of JSON each, synchronised together. NaN and infinity are refused."""
    lines = [json.dumps(content, allow_nan=False) + "\n" for content in contents]
    with path.open("a") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, columns: Mapping[str, Column] = EVALUATION_COLUMNS) -> list[dict[str, Value]]:
    """Read all whole rows; a torn last line, left by a crash, is dropped.

    Raises: ValueError naming file and line for a row that is corrupt or lacks a column.
    """
    return list(_whole_rows(path, path.read_bytes(), columns)) if path.exists() else []


def complete(row: Any, columns: Mapping[str, Column], place: str) -> dict[str, Value]:
    """Return a row that has been read, with null for the columns that are younger than it.

    Raises: ValueError naming `place` for a row of another kind, or of a newer version.
    """
    if not isinstance(row, dict) or not row.keys() >= _IN_EVERY_ROW:
        raise ValueError(f"{place}: not a row of a record; move the file away to run this run again")
    if unknown := sorted(row.keys() - columns.keys()):
        raise ValueError(
            f"{place}: columns of another version ({', '.join(unknown)}); update critbatch, or move the file away to "
            f"run this run again"
        )
    return {name: row.get(name) for name in columns}


def trim_rows(path: Path, last_step: int, columns: Mapping[str, Column] = EVALUATION_COLUMNS) -> None:
    """Drop the rows after `last_step`: they will be made again by a run that resumes there."""
    kept = [row for row in read_rows(path, columns) if _as_int(row["step"]) <= last_step]
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept).encode())


def _whole_rows(path: Path, content: bytes, columns: Mapping[str, Column]) -> Iterator[dict[str, Value]]:
    lines: Iterable[bytes] = content.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: not a JSON row; the file is corrupt: move it away to run this run again"
            ) from None
        yield complete(row, columns, f"{path}, line {number}")


def _as_int(value: Value) -> int:
    assert isinstance(value, int), value
    return value
