"""What one optimizer step costs on p devices: compute, optimizer, all-reduce; every constant with its source.

A device computes B / p tokens, as whole micro-batches one after the other, then updates the weights; for p > 1 a ring
all-reduce of the float32 gradients adds 2 (p - 1) / p × 4 bytes × parameters / bandwidth + latency log2 p. The matrix
work of the optimizer (Newton–Schulz) is done by every device, or shared out: then each does 1 / p of it and gathers the
rest, (p - 1) / p × 4 bytes × matrix parameters over the same link.

Assumptions: communication does not overlap with computation; every device is one like those that ran; whole matrices
can be shared out evenly. A device gets no fewer tokens a step than were timed: below that the cost is not known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.verdicts import Finding

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

PARAMETER_BYTES = 4

#: The size of micro-batch that a fit knows the seconds of.
ONE_TOKEN = 1


@dataclass(frozen=True)
class CostOptions:
    """What is assumed of a machine that was not measured: by default one 200 Gb/s link a device.

    `latency_seconds` is that of launching a collective, for each doubling of the devices. Only as many devices are
    projected as a power of two up to `max_devices`.
    """

    bandwidth_bytes_per_second: float = 25e9
    latency_seconds: float = 20e-6
    max_devices: int = 1024
    optimizer_sharing: Literal["replicated", "shared"] = "replicated"

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_second > 0 and self.latency_seconds >= 0 and self.max_devices >= 1):
            raise ValueError(
                f"a bandwidth of {self.bandwidth_bytes_per_second:g} bytes/s, a latency of {self.latency_seconds:g} s "
                f"and {self.max_devices} devices: the first must be above zero, the second not below, the third one "
                "or more"
            )


class Place(NamedTuple):
    """Whose step is timed, and on what."""

    model: str
    optimizer: str
    device: str


@dataclass(frozen=True)
class StepCost:
    """Seconds of the parts of one step.

    `micro_batch_seconds` is by tokens of the micro-batch; a fit knows the seconds of one token alone.
    `per_step_seconds` is the optimizer's (timed) or all that does not grow with the batch (fitted); None where one
    batch size alone ran: its share is then in the tokens. `matrix_seconds` is the part of it that devices could share.
    """

    micro_batch_seconds: Mapping[int, float]
    per_step_seconds: float | None
    matrix_seconds: float
    min_tokens_per_device: float
    sequence_length: int
    num_params: int | None
    num_matrix_params: int | None
    source: str
    findings: tuple[Finding, ...] = ()

    @property
    def is_timed(self) -> bool:
        return self.micro_batch_seconds.keys() != {ONE_TOKEN}

    def is_known(self, global_batch_tokens: Counts, num_devices: Counts) -> NDArray[np.bool_]:
        """Say for each pair whether all devices get equally many whole sequences, and as many tokens as were timed."""
        whole: NDArray[np.bool_] = global_batch_tokens % (num_devices * self.sequence_length) == 0
        return whole & (global_batch_tokens / num_devices >= self.min_tokens_per_device)

    def step_seconds(self, global_batch_tokens: Counts, num_devices: Counts, options: CostOptions) -> Array:
        """Return the seconds of a step for each pair of a batch and a number of devices; NaN where not known."""
        shared = options.optimizer_sharing == "shared"
        saved = self.matrix_seconds * (1 - 1 / num_devices) if shared else np.zeros(len(num_devices))
        optimizer = (self.per_step_seconds or 0.0) - saved
        return self._compute_seconds(global_batch_tokens / num_devices) + optimizer + self._link(num_devices, options)

    def _compute_seconds(self, tokens_per_device: Array) -> Array:
        """Split as the harness does: into the largest micro-batch that divides a device's tokens."""
        seconds = np.full(tokens_per_device.shape, np.nan)
        for size in sorted(self.micro_batch_seconds):
            split = tokens_per_device / size * self.micro_batch_seconds[size]
            seconds = np.where(tokens_per_device % size == 0, split, seconds)
        return seconds

    def _link(self, num_devices: Counts, options: CostOptions) -> Array:
        """Return the seconds of the collectives of a step: one device has none."""
        sent, launches = 2 * _or_nan(self.num_params), 1
        if options.optimizer_sharing == "shared" and self.matrix_seconds:
            sent, launches = sent + _or_nan(self.num_matrix_params), 2
        volume = (1 - 1 / num_devices) * PARAMETER_BYTES * sent
        seconds = volume / options.bandwidth_bytes_per_second
        seconds += launches * options.latency_seconds * np.log2(num_devices)
        return np.where(num_devices == 1, 0.0, seconds)


def constants(
    costs: Mapping[Place, StepCost], errors: Mapping[Place, str], options: CostOptions
) -> Iterator[dict[str, Any]]:
    """Yield the rows of COST_MODEL; `errors` says of each place how the model did against measured points."""
    several_devices = len({place.device for place in costs}) > 1
    for place, cost in costs.items():
        where = f"{place.model} {place.optimizer}{f' on {place.device}' if several_devices else ''}"
        for name, value, unit, source in _parts(cost, "; ".join(filter(None, (cost.source, errors.get(place))))):
            yield {"name": f"{where} {name}", "value": value, "unit": unit, "source": source}
    if costs:
        yield from _assumptions(options)


def _parts(cost: StepCost, source: str) -> Iterator[tuple[str, float | None, str, str]]:
    yield ("optimizer" if cost.is_timed else "per_step"), cost.per_step_seconds, "s/step", source
    for size, seconds in cost.micro_batch_seconds.items():
        name, unit = (f"micro_batch_{size}", "s") if cost.is_timed else ("per_token", "s/token")
        yield name, seconds, unit, source
    if cost.matrix_seconds:
        assumed = "assumed: the FLOPs of its matrix products at the rate of forward and backward"
        yield "matrices", cost.matrix_seconds, "s/step", source if cost.is_timed else assumed
    if cost.num_params is not None:
        yield "parameters", float(cost.num_params), "", "counted"


def _assumptions(options: CostOptions) -> Iterator[dict[str, Any]]:
    link = f"assumed: one link of {options.bandwidth_bytes_per_second * 8e-9:g} Gb/s per device"
    yield {"name": "bandwidth", "value": options.bandwidth_bytes_per_second, "unit": "bytes/s", "source": link}
    latency = "assumed, for each doubling of the devices"
    yield {"name": "latency", "value": options.latency_seconds, "unit": "s", "source": latency}
    size = "float32 gradients, ring all-reduce: 2 (p - 1) / p times these are sent"
    yield {"name": "gradient_size", "value": float(PARAMETER_BYTES), "unit": "bytes/parameter", "source": size}
    sharing = {
        "replicated": "every device updates all matrices",
        "shared": "each device updates its part of the matrices and gathers the rest",
    }[options.optimizer_sharing]
    stated = f"assumed, {options.optimizer_sharing}: {sharing}"
    yield {"name": "optimizer_sharing", "value": None, "unit": "", "source": stated}


def _or_nan(number: int | None) -> float:
    return float("nan") if number is None else float(number)
