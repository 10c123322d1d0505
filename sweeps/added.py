"""Runs that a command adds to a sweep, round by round, with the reason for each: `rounds.jsonl` in the sweep's folder.

A round is one line, written before its runs are listed in `sweep.json`; so a command that was killed in between finds
the round and goes on with it, and one that finds half a line proposes that round again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.record import RunFolder, read_json, write_atomically

ROUNDS_JSONL = "rounds.jsonl"

#: What rounds choose for the runs that they add; anything else is the sweep's.
_CHOSEN = ("optimizer.peak_lr", "global_batch_tokens", "token_budget", "init_seed", "data_seed")


@dataclass(frozen=True)
class Proposal:
    """A run that would tell most, and why."""

    run: RunConfig
    why: str


@dataclass(frozen=True)
class Round:
    """One round: its command, the settings that it tunes beside the learning rate, and run_ids with reasons."""

    command: str
    axes: tuple[str, ...]
    reasons: Mapping[str, str]


def read_rounds(folder: Path) -> list[Round]:
    """Return the rounds of a sweep's folder; half a line at the end is none."""
    path = folder / ROUNDS_JSONL
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def write_round(folder: Path, command: str, axes: Iterable[str], proposals: Iterable[Proposal]) -> None:
    """Append a round, whole."""
    path = folder / ROUNDS_JSONL
    before = path.read_text() if path.exists() else ""
    reasons = {proposal.run.run_id: proposal.why for proposal in proposals}
    line = json.dumps({"command": command, "axes": list(axes), "reasons": reasons})
    write_atomically(path, f"{before[: before.rfind(chr(10)) + 1]}{line}\n".encode())


def added_runs(folder: Path, like: Sequence[RunConfig]) -> list[RunConfig]:
    """Return the runs that rounds added and that still belong to the sweep: they differ from one of the runs `like`
    which it consists of in nothing but what rounds choose.
    """
    rounds = read_rounds(folder)
    kin_by_axes: dict[tuple[str, ...], set[str]] = {}
    found: dict[str, RunConfig] = {}
    for each in rounds:
        if each.axes not in kin_by_axes:
            kin_by_axes[each.axes] = {shared_settings(run, each.axes) for run in like}
        for run_id in each.reasons:
            config = RunFolder(folder / "runs" / run_id).config
            if not config.exists():
                continue  # the folder was removed: its run is proposed again
            run = RunConfig.parse(read_json(config), source=str(config))
            if shared_settings(run, each.axes) in kin_by_axes[each.axes]:
                found[run_id] = run
    return list(found.values())


def shared_settings(run: RunConfig, axes: Iterable[str] = (), chosen: Iterable[str] = _CHOSEN) -> str:
    """Return what a run has in common with the other runs of its sweep, as one string; `axes` are tuned as well."""
    content = run.model_dump(mode="json")
    for key in (*chosen, *axes):
        *sections, last = key.split(".")
        part: Any = content
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part.pop(last, None)
    return json.dumps(content, sort_keys=True)


def _parsed(line: str, place: str) -> Round:
    try:
        content = json.loads(line)
        return Round(content["command"], tuple(content["axes"]), dict(content["reasons"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{place}: not a round of tune or cbs; restore the file, or move it away to forget the rounds"
        ) from None
