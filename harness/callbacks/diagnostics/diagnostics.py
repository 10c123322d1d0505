"""Measures at marks, and appends the rows to the record; the clock of evaluation runs meanwhile."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from harness.callbacks.clocks import Clocks
from harness.callbacks.diagnostics.gradient_noise import GradientNoise
from harness.callbacks.diagnostics.groups import groups_of
from harness.callbacks.diagnostics.rows import Row, row_of
from harness.callbacks.diagnostics.sharpness import curvature_of, sharpness_rows
from harness.callbacks.diagnostics.spectra import STATISTICS, singular_values, size_rows, spectrum, spectrum_rows
from harness.callbacks.step_callback import StepCallback
from harness.config import RunConfig
from harness.module import LanguageModel
from harness.record import DIAGNOSTIC_COLUMNS, RunFolder, append_lines, trim_rows

#: What optimizers call the average of gradients that they keep of a weight.
_MOMENTA = ("momentum", "exp_avg", "momentum_buffer")


class Diagnostics(StepCallback):
    """Writes diagnostics.jsonl; `marks` are the steps after which it measures.

    `validation` are all sequences that the run is evaluated on; the sharpness takes some, evenly spread.
    """

    def __init__(
        self,
        folder: RunFolder,
        run: RunConfig,
        marks: Collection[int],
        validation: Sequence[Tensor],
        clocks: Clocks,
        noise: GradientNoise | None,
    ) -> None:
        self._folder, self._marks, self._clocks, self._noise = folder, frozenset(marks), clocks, noise
        self._measured, self._groups = run.diagnostics, groups_of(run.model)
        sequences = spread_evenly(validation, run.diagnostics.sharpness_tokens // run.model.sequence_length)
        self._sequences = torch.split(sequences, len(validation[0]))
        self._before: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        step = trainer.global_step
        if trainer.is_global_zero and self._folder.diagnostics.exists():
            trim_rows(self._folder.diagnostics, step if step else -1, DIAGNOSTIC_COLUMNS)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:  # noqa: ARG002
        if self._measured.any_of_updates and trainer.global_step + 1 in self._marks:
            with self._clocks.use("eval"):
                self._before = [weight.detach().clone() for weight in pl_module.network.parameters()]

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if trainer.global_step not in self._marks:
            return
        with self._clocks.use("eval"):
            rows = [*self._rows(trainer, module)]
            self._before = []
            if trainer.is_global_zero:
                step = trainer.global_step
                known = {"run_id": module.run.run_id, "step": step, "tokens_seen": module.run.clock.tokens_after(step)}
                append_lines(self._folder.diagnostics, (row | known for row in rows))

    def _rows(self, trainer: pl.Trainer, module: LanguageModel) -> Iterator[Row]:
        if self._noise is not None:
            yield from self._noise.take()
        if not self._before:
            return
        after = [weight.detach() for weight in module.network.parameters()]
        update = [*torch._foreach_sub(after, self._before)]
        if self._measured.update_norms:
            yield from size_rows(update, self._groups)
        if self._measured.spectra:
            yield from self._spectra(trainer, module, update)
        if self._measured.sharpness:
            curvature = curvature_of(module, self._before, update, self._sequences)
            yield from sharpness_rows(curvature, module.run.model)

    def _spectra(self, trainer: pl.Trainer, module: LanguageModel, update: Sequence[Tensor]) -> Iterator[Row]:
        hidden = self._groups["hidden"]
        weights = list(module.network.parameters())
        momenta = momenta_of(trainer.optimizers[0], weights)
        own = {place: _spectrum_of(momenta[place]) for place in hidden if place in momenta}
        of_momenta = _of_all_ranks(trainer, own, len(weights))
        yield from spectrum_rows("update", {place: _spectrum_of(update[place]) for place in hidden}, self._groups)
        yield from spectrum_rows("momentum", of_momenta, self._groups)
        if not of_momenta:
            yield row_of("momentum_stable_rank", "hidden", None, "the optimizer keeps no momentum")


def momenta_of(optimizer: Optimizer, weights: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the momenta that this process keeps, by the places of their weights."""
    kept = ((place, optimizer.state.get(weight, {})) for place, weight in enumerate(weights))
    found = ((place, next((own[name] for name in _MOMENTA if name in own), None)) for place, own in kept)
    return {place: momentum for place, momentum in found if momentum is not None}


def spread_evenly(batches: Sequence[Tensor], number: int) -> Tensor:
    """Return `number` of the sequences of some batches, evenly spread over them."""
    sequences = torch.cat([*batches])
    return sequences[torch.arange(number) * len(sequences) // number]


def _spectrum_of(matrix: Tensor) -> Tensor:
    return spectrum(singular_values(matrix))


def _of_all_ranks(trainer: pl.Trainer, own: dict[int, Tensor], size: int) -> dict[int, Tensor]:
    """Unite what each process has of the momenta: all of them, or those that it alone keeps."""
    if trainer.world_size == 1:
        return own
    table = torch.zeros(size, 1 + len(STATISTICS), dtype=torch.float64, device=trainer.strategy.root_device)
    for place, statistics in own.items():
        table[place] = torch.cat((statistics.new_ones(1), statistics))
    reduced: Any = trainer.strategy.reduce(table, reduce_op="sum")
    return {place: row[1:] / row[0] for place, row in enumerate(reduced) if row[0] > 0}
