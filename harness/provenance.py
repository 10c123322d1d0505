"""What a run was made with: the row of RUN_COLUMNS that is known when it starts."""

import math
import platform
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from harness.batch_plan import RunPlan
from harness.config import MachineConfig, RunConfig
from harness.corpus import Corpus
from harness.flops import (
    FLOPS_CONVENTION,
    count_nonembedding_parameters,
    count_parameters,
    forward_backward_flops_per_token,
    optimizer_flops_per_step,
)
from harness.optimizers.combined import route
from harness.origin import code_commit, code_snapshot, host_name, job_id, lock_hash, nvidia_driver
from harness.record import RUN_COLUMNS, Value


def describe_run(run: RunConfig, machine: MachineConfig, plan: RunPlan, corpus: Corpus) -> dict[str, Value]:
    """Return a row of RUN_COLUMNS for a run that starts now; what is known only at the end is null."""
    row: dict[str, Value] = dict.fromkeys(RUN_COLUMNS) | _science(run) | _counts(run) | _machine(machine, plan)
    row |= {"bytes_per_token": corpus.bytes_per_token, "routing": _routing_summary(routing_table(run))}
    row |= {"started_at": datetime.now(UTC).isoformat(timespec="seconds"), "status": "running", "resumes": 0}
    row["micro_batch_halvings"] = 0
    assert row.keys() == RUN_COLUMNS.keys(), row.keys() ^ RUN_COLUMNS.keys()
    return row


def routing_table(run: RunConfig) -> list[dict[str, Any]]:
    """Return the algorithm, rate multiplier and weight decay of every tensor, those of muP included, in the order of
    the network.
    """
    return [
        {
            "name": parameter.name,
            "role": parameter.role,
            "shape": list(parameter.shape),
            "algorithm": algorithm,
            "lr_multiplier": lr_multiplier,
            "weight_decay": weight_decay,
        }
        for parameter, algorithm, lr_multiplier, weight_decay in route(run.model, run.optimizer)
    ]


def _routing_summary(table: list[dict[str, Any]]) -> str:
    weights: Counter[str] = Counter()
    for row in table:
        weights[row["algorithm"]] += math.prod(row["shape"])
    return ", ".join(f"{algorithm}: {count}" for algorithm, count in sorted(weights.items()))


def _science(run: RunConfig) -> dict[str, Value]:
    return {
        "run_id": run.run_id,
        "model": run.model_name,
        "optimizer": run.optimizer.name,
        "global_batch_tokens": run.global_batch_tokens,
        "token_budget": run.token_budget,
        "realized_tokens": run.realized_tokens,
        "peak_lr": run.optimizer.peak_lr,
        "weight_decay": run.optimizer.weight_decay,
        "warmup_tokens": run.warmup_effective_tokens,
        "schedule": run.schedule.kind,
        "averaging": run.averaging.kind,
        "protocol": run.protocol,
        "parent_run_id": run.branch.parent if run.branch else None,
        "branch_tokens": run.branch.at_tokens if run.branch else None,
        "init_seed": run.init_seed,
        "data_seed": run.data_seed,
        "precision": run.precision,
        "sequence_length": run.model.sequence_length,
        "vocab_size": run.model.known_vocab_size,
        "corpus": run.corpus.source,
        "corpus_fingerprint": run.corpus.fingerprint,
        "science_version": run.science_version,
        "config_json": run.model_dump_json(),
    }


def _counts(run: RunConfig) -> dict[str, Value]:
    return {
        "num_params": count_parameters(run.model),
        "num_params_nonembedding": count_nonembedding_parameters(run.model),
        "flops_per_token": forward_backward_flops_per_token(run.model),
        "optimizer_flops_per_step": optimizer_flops_per_step(run.model, run.optimizer),
        "flops_convention": FLOPS_CONVENTION,
    }


def _machine(machine: MachineConfig, plan: RunPlan) -> dict[str, Value]:
    return {
        "device": device_name(machine),
        "host": host_name(),
        "job_id": job_id(),
        "driver": nvidia_driver() if uses_gpu(machine) else None,
        "cuda_version": torch.version.cuda if uses_gpu(machine) else None,
        "num_devices": machine.devices,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "accumulation": plan.final.accumulation,
        "threads": torch.get_num_threads(),
        "compiled": machine.compile,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "lightning_version": version("lightning"),
        "code_commit": code_commit(),
        "code_snapshot": code_snapshot(),
        "lock_hash": lock_hash(),
    }


def uses_gpu(machine: MachineConfig) -> bool:
    """Say whether the run trains on a GPU. Raises: ValueError when one is asked for and there is none."""
    if machine.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("machine.accelerator is gpu, but PyTorch finds no CUDA device; set it to cpu or auto")
    return machine.accelerator != "cpu" and torch.cuda.is_available()


def device_name(machine: MachineConfig) -> str:
    """Return the model name of the GPU or of the processor."""
    if uses_gpu(machine):
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
