"""What a sweep file may say: `SweepSpec`, and the learning rates of an optimizer.

The settings of the runs themselves stay plain mappings here; they are checked as `RunConfig` once every axis is filled
in.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from harness.config import Count, MachineConfig
from harness.frozen import Frozen, nearest
from harness.optimizers.config import OptimizerConfig, Positive

#: The keys of each optimizer, by its name.
OPTIMIZER_KEYS: dict[str, set[str]] = {
    section.model_fields["name"].default: set(section.model_fields) - {"name"}
    for section in get_args(get_args(OptimizerConfig)[0])
}

Axis = Annotated[list[Any], Field(min_length=1)]


class LearningRates(Frozen):
    """The peak learning rates of one optimizer: a list, or multiples of a centre that moves with the batch.

    centre(B) = min(centre · (B / at_batch_tokens)^exponent, cap); the cap is on the centre, not on its multiples.
    """

    rates: Annotated[tuple[Positive, ...] | None, Field(min_length=1)] = None
    centre: Positive | None = None
    at_batch_tokens: Count | None = None
    exponent: float = 0.5
    cap: Positive | None = None
    multiples: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)

    @model_validator(mode="after")
    def _one_kind(self) -> "LearningRates":
        if (self.rates is None) == (self.centre is None):
            raise ValueError("give either a list of rates, or a centre with at_batch_tokens")
        if self.centre is not None and self.at_batch_tokens is None:
            raise ValueError(f"the centre {self.centre:g} needs at_batch_tokens: the batch at which it holds")
        return self

    def at(self, global_batch_tokens: int) -> list[float]:
        """Return the peak rates at one batch, to four significant digits (as a run's name prints them)."""
        if self.rates is not None:
            return list(self.rates)
        assert self.centre is not None
        assert self.at_batch_tokens is not None
        scaled = self.centre * (global_batch_tokens / self.at_batch_tokens) ** self.exponent
        centre = min(scaled, self.cap) if self.cap else scaled
        return [float(f"{centre * multiple:.4g}") for multiple in self.multiples]


def _number_or_list(given: Any) -> Any:
    if isinstance(given, int | float):
        return {"rates": [given]}
    return {"rates": given} if isinstance(given, list) else given


class OptimizerSettings(Frozen):
    """One optimizer of the sweep: its learning rates, and any field of its configuration."""

    model_config = ConfigDict(extra="allow")

    learning_rate: Annotated[
        LearningRates | None, BeforeValidator(_number_or_list), Field(examples=["[0.01, 0.02]"])
    ] = None

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Confirm(Frozen):
    """The second stage: the best `top` rates of every cell, again on fresh `seeds`."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    top: Count = 1


class BranchedDecay(Frozen):
    """Every run of the grid is a trunk at a constant rate; each budget is a branch of it.

    A branch is a run of warmup, constant rate and decay (`wsd`) to `final_fraction`, whose last `decay_share` is its
    own: what comes before is the trunk's.
    """

    token_budgets: Annotated[tuple[Count, ...], Field(min_length=1, examples=["[65536, 131072, 262144]"])]
    decay_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0

    @model_validator(mode="after")
    def _check_distinct(self) -> "BranchedDecay":
        _refuse_repeated("branched_decay.token_budgets", self.token_budgets)
        return self


class BranchedBatch(Frozen):
    """From each run of the grid, at each of `at_tokens`, a branch for each k of `multiples`: at k times the batch and
    k^lr_exponent times the learning rate, for `tokens` more.

    Source: arXiv 2505.23971, section 3: exponent 1/2, for Adam.
    """

    at_tokens: Annotated[tuple[Count, ...], Field(min_length=1, examples=["[65536, 262144]"])]
    multiples: Annotated[tuple[Count, ...], Field(min_length=1, examples=["[1, 2, 4, 8]"])] = (1, 2, 4, 8)
    lr_exponent: float = 0.5
    tokens: Count

    @model_validator(mode="after")
    def _check_multiples(self) -> "BranchedBatch":
        _refuse_repeated("branched_batch.at_tokens", self.at_tokens)
        _refuse_repeated("branched_batch.multiples", self.multiples)
        if 1 not in self.multiples:
            raise ValueError(
                f"multiples {list(self.multiples)} lack 1: the branch at the trunk's own batch is what others are "
                "compared with"
            )
        return self


class SweepSpec(Frozen):
    """A sweep: what all its runs share, and the axes along which they differ.

    `extends` names the parent in a file, and is empty once that is merged in. `grid` axes are crossed, `zip` axes
    walked together; `optimizers` is an axis by itself. With `where`, a combination is kept when it matches at least one
    entry: when, for every key of that entry, its value on that axis is the one given, or one of the list given.
    With `branched_decay` or `branched_batch` the runs of the grid are trunks, which go as far as the last branch starts
    unless `token_budget` says otherwise.
    """

    name: str
    description: str = ""
    extends: str | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    optimizers: Annotated[dict[str, OptimizerSettings], Field(min_length=1)]
    grid: dict[str, Axis] = Field(default_factory=dict)
    zip: dict[str, Axis] = Field(default_factory=dict)
    where: list[dict[str, Any]] = Field(
        default_factory=list, examples=["[{optimizer: muon, global_batch_tokens: [1024, 4096]}]"]
    )
    token_budget: Annotated[
        Count | dict[Count, Count] | None, Field(examples=["65536, or for each batch {256: 65536, 1024: 131072}"])
    ] = None
    confirm: Confirm | None = None
    branched_decay: BranchedDecay | None = None
    branched_batch: BranchedBatch | None = None
    targets_nats: Annotated[tuple[Positive, ...], Field(min_length=1, examples=["[2.2, 2.0]"])]
    baseline: str | None = None
    machine: MachineConfig = MachineConfig()

    @model_validator(mode="after")
    def _check_name(self) -> "SweepSpec":
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name {self.name!r} becomes a folder: use letters, digits, '.', '_' and '-' only")
        return self

    @model_validator(mode="after")
    def _check_optimizers(self) -> "SweepSpec":
        for name in self.optimizers:
            if name not in OPTIMIZER_KEYS:
                raise ValueError(f"unknown optimizer {name!r} under optimizers; {nearest(name, OPTIMIZER_KEYS)}")
        for name in self.optimizer_axis:
            if name not in self.optimizers:
                raise ValueError(
                    f"grid.optimizer lists {name!r}, which has no section under optimizers; "
                    f"{nearest(str(name), self.optimizers)}"
                )
        if self.baseline is not None and self.baseline not in self.optimizers:
            raise ValueError(
                f"baseline {self.baseline!r} is none of the sweep's optimizers; "
                f"{nearest(self.baseline, self.optimizers)}"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer_keys(self) -> "SweepSpec":
        wrong = [
            f"{key!r} is not a key of optimizers.{name}; {nearest(key, {'learning_rate', *OPTIMIZER_KEYS[name]})}"
            for name, settings in self.optimizers.items()
            for key in settings.fields
            if key not in OPTIMIZER_KEYS[name]
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @model_validator(mode="after")
    def _check_axes(self) -> "SweepSpec":
        for key, values in self.grid.items():
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise ValueError(f"grid.{key} lists {value!r} twice")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the lists under zip are walked together and must be equally long; they have {lengths}")
        both = sorted(self.grid.keys() & self.zip.keys())
        if both:
            raise ValueError(f"{', '.join(both)} is under grid and under zip; keep one of them")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> "SweepSpec":
        if self.confirm and self.has_branches:
            raise ValueError(
                "confirm chooses rates by tokens to a loss, which branches do not give; remove confirm, and list the "
                "rates and seeds of the trunks under optimizers and grid"
            )
        return self

    @property
    def has_branches(self) -> bool:
        return self.branched_decay is not None or self.branched_batch is not None

    @property
    def optimizer_axis(self) -> list[str]:
        """The optimizers that are run: all of the section `optimizers`, unless grid.optimizer picks some."""
        return self.grid.get("optimizer", list(self.optimizers))

    @property
    def baseline_name(self) -> str:
        """The optimizer that ratios refer to: `baseline` when that is run, else the first one."""
        return self.baseline if self.baseline in self.optimizer_axis else self.optimizer_axis[0]


def _refuse_repeated(name: str, values: Sequence[int]) -> None:
    if repeated := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{name} lists {repeated[0]} twice")
