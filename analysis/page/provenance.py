"""Where the numbers come from: what the runs have in common, what differs, and which did not end as planned."""

from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page.html_table import html_table
from analysis.quantities.step_costs import cpu_shares
from analysis.schemas import RUNS

_FACTS = (
    "corpus", "corpus_fingerprint", "vocab_size", "sequence_length", "model", "num_params", "num_params_nonembedding",
    "flops_convention", "schedule", "warmup_tokens", "averaging", "protocol", "precision", "init_seed", "data_seed",
    "host", "device", "num_devices", "driver", "cuda_version", "threads", "micro_batch_tokens", "compiled",
    "python_version", "torch_version", "lightning_version", "lock_hash", "code_commit", "code_snapshot",
    "science_version",
)  # fmt: skip
_MAX_VALUES = 12
_PROBLEM_COLUMNS = ["run_id", "stage", "status", "stop_reason", "tokens_seen", "token_budget"]


def facts(estimates: Estimates) -> list[tuple[str, str]]:
    """Return what the runs have in common, and the values of what differs between them."""
    records = estimates.records
    runs = records.runs
    said = [("runs", str(runs.height))] if runs.height else []
    if records.given.height:
        said.append(("tokens to targets as given", fmt.count(records.given.height, "row")))
    if runs["train_seconds"].count():
        said.append(("training time of all runs", fmt.seconds(float(runs["train_seconds"].sum()))))
    shares = cpu_shares(records)["cpu_share"]
    if len(shares):
        said.append(("CPU share of a run's threads", _share_range(shares)))
    return said + [(name.replace("_", " "), _values(runs[name])) for name in _FACTS if runs[name].count()]


def problems(estimates: Estimates) -> dict[str, Any]:
    """Return the runs that did not finish, those of the manifest that left no record, and both in words."""
    runs, manifest = estimates.records.runs, estimates.records.manifest
    unfinished = runs.filter(pl.col("status") != "finished").select(_PROBLEM_COLUMNS)
    planned = {run.run_id for run in manifest.runs}
    return {
        "table": html_table("runs", "Runs that diverged or have not finished.", unfinished, RUNS, exact=True),
        "missing": sorted(planned - set(runs["run_id"])),
        "words": _incomplete(runs, len(planned - set(runs["run_id"])), len(planned)),
    }


def _incomplete(runs: pl.DataFrame, num_missing: int, num_planned: int) -> str:
    """Say how many runs diverged, have not finished, or left no evaluation; empty where all is whole."""
    diverged, unfinished = ((runs["status"] == status).sum() for status in ("diverged", "running"))
    said = [f"{diverged} diverged"] * bool(diverged) + [f"{unfinished} have not finished"] * bool(unfinished)
    words = [f"of {fmt.count(runs.height, 'run')} {' and '.join(said)}"] * bool(said)
    words += [f"{num_missing} of {num_planned} planned left no evaluation"] * bool(num_missing)
    return "; ".join(words)


def _share_range(shares: pl.Series) -> str:
    lowest, median, highest = (shares.quantile(part, "linear") or 0.0 for part in (0, 0.5, 1))
    return f"{lowest:.0%} to {highest:.0%}, median {median:.0%}"


def _values(column: pl.Series) -> str:
    write = fmt.column_writer(column.name)
    values = column.unique().sort(nulls_last=True)
    return ", ".join(fmt.first([fmt.MISSING if value is None else write(value) for value in values], _MAX_VALUES))
