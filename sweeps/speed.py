"""How long runs take, by what was measured of them: their steps timed one by one, or finished runs as a whole."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sweeps.printing import counted
from sweeps.work import Kind, Work

_UNKNOWN = "no finished run of this sweep to measure it on; state it with --flops-per-second, or: critbatch time SWEEP"


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of one micro-batch, and of what is done once a step: clipping, update, averaging."""

    micro_batch: float
    optimizer: float


@dataclass(frozen=True)
class Speed:
    """How fast a run is that has a slot on one kind of device, and where that is from; what is not known is a reason,
    not a zero.

    Work whose steps were timed takes that long; other work its FLOPs over `flops_per_second`, of all its devices.
    """

    flops_per_second: float | None
    source: str
    device: str | None = None
    timed: Mapping[Kind, StepSeconds] = field(default_factory=dict)

    @property
    def is_known(self) -> bool:
        return bool(self.flops_per_second or self.timed)

    @property
    def in_words(self) -> str:
        """Where the speed is from, with the device and the number as far as they are known."""
        at = f"{self.flops_per_second:.2e} FLOP/s a slot" if self.flops_per_second and not self.timed else None
        return ": ".join(filter(None, (self.device, at, self.source)))

    def seconds(self, work: Work) -> float | None:
        """Return how long a run takes at most.

        Assumption: an evaluation, which is forward alone, takes a third of the time of its tokens in training; devices
        do not wait for each other.
        """
        if step := self.timed.get(work.kind):
            training = work.micro_batches * step.micro_batch + work.steps * step.optimizer
            return training + work.evaluation_tokens / work.micro_batch_tokens * step.micro_batch / 3
        return work.flops / self.flops_per_second if self.flops_per_second else None


def measured_speeds(
    run_rows: Iterable[Mapping[str, Any]], timing_rows: Sequence[Mapping[str, Any]] = ()
) -> tuple[Speed, ...]:
    """Return a speed for each kind of device of a sweep's rows of RUN_COLUMNS and TIMING_COLUMNS, the timed one first;
    an unknown speed when there is none.
    """
    timed: dict[str | None, list[Mapping[str, Any]]] = {}
    finished: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in timing_rows:
        timed.setdefault(row["device"], []).append(row)
    for row in run_rows:
        if row["status"] == "finished" and row["train_seconds"]:
            finished.setdefault(row.get("device"), []).append(row)
    devices = dict.fromkeys([*timed, *finished])
    speeds = tuple(_speed(device, finished.get(device, ()), timed.get(device, ())) for device in devices)
    return speeds or (Speed(None, _UNKNOWN),)


def _speed(device: str | None, finished: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]]) -> Speed:
    flops = sum(map(_own_flops, finished))
    seconds = sum(row["train_seconds"] for row in finished)
    sources = ["steps timed by critbatch time"] if timed else []
    if finished:
        sources.append(f"measured on {counted(len(finished), 'finished run')} of this sweep")
    return Speed(flops / seconds if finished else None, ", else ".join(sources), device, _by_kind(timed))


def _own_flops(row: Mapping[str, Any]) -> float:
    """Return the training FLOPs that a run did itself: of a branch, those after the state that it starts from.

    Assumption: it has as many tokens a step as its trunk; the optimizer's part is small where it has more.
    """
    whole = row["flops_per_token"] * row["tokens_seen"] + row["optimizer_flops_per_step"] * row["step"]
    return float(whole * (1 - (row.get("branch_tokens") or 0) / row["tokens_seen"]))


def _by_kind(rows: Iterable[Mapping[str, Any]]) -> dict[Kind, StepSeconds]:
    """Return the slowest of the timings of each kind: runs may differ in what no kind names, as the dtype of a
    product.
    """
    slowest: dict[Kind, StepSeconds] = {}
    for row in rows:
        kind = (row["model"], row["optimizer"], row["precision"], row["micro_batch_tokens"])
        before = slowest.get(kind, StepSeconds(0.0, 0.0))
        slowest[kind] = StepSeconds(
            max(row["micro_batch_seconds"], before.micro_batch), max(row["optimizer_seconds"], before.optimizer)
        )
    return slowest
