"""The gradient noise scale, from the sizes of gradients at two batch sizes in every step.

At the same weights E|G_B|² = |G|² + tr Σ / B, so that two batch sizes give both. With the gradient of the whole batch
goes that of one of its parts, where there are any:

`micro_batches`: of a forward pass on one device. `ranks`: of all micro-batches of one device, before the devices' are
averaged. `halves`: of one half of the batch, where that is a single micro-batch; it takes a forward and backward pass
of its own, so that it is measured at `MOST_HALVES` steps between two marks at most.

Batches are counted in tokens. Sequences are what is independent, not tokens: tr Σ of one token is that of a sequence
times its length, so that B_simple = tr Σ / |G|² is a number of tokens too.

Source: arXiv 1812.06162, appendix A.1. Numerator and denominator are averaged over the steps since the last mark, each
by itself; their variances over these steps give the interval.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from harness.callbacks.clocks import Clocks
from harness.callbacks.diagnostics.eager_loss import eager_loss
from harness.callbacks.diagnostics.groups import Groups, membership, squares
from harness.callbacks.diagnostics.rows import Row, row_of
from harness.module import LanguageModel

#: Steps between two marks at which a batch of one micro-batch is halved.
MOST_HALVES = 16


@dataclass
class Moments:
    """Sums over steps of the unbiased estimates, by group: signal |G|², noise tr Σ, their squares and product.

    `sums` is (5, groups), float64. The two batches, in tokens, are those of the last step.
    """

    sums: Tensor
    num_steps: int = 0
    small_batch_tokens: float = 0.0
    big_batch_tokens: float = 0.0

    def add(self, small_batch: float, small_squares: Tensor, big_batch: float, big_squares: Tensor) -> None:
        """Add a step, from E|G|² of each group at the two batch sizes."""
        signal = (big_batch * big_squares - small_batch * small_squares) / (big_batch - small_batch)
        noise = (small_squares - big_squares) / (1 / small_batch - 1 / big_batch)
        self.sums += torch.stack((signal, noise, signal**2, noise**2, signal * noise))
        self.num_steps += 1
        self.small_batch_tokens, self.big_batch_tokens = small_batch, big_batch

    def rows(self, estimator: str, groups: Groups) -> Iterator[Row]:
        """Yield what the record says of each group."""
        for group, sums in zip(groups, self.sums.T.tolist(), strict=True):
            yield self._row(f"noise_scale_{estimator}", group, sums)

    def _row(self, quantity: str, group: str, sums: list[float]) -> Row:
        steps = self.num_steps
        signal, noise, signal_2, noise_2, product = (total / steps for total in sums)
        moments = (signal, noise, signal_2 - signal**2, noise_2 - noise**2, product - signal * noise)
        if not all(map(math.isfinite, moments)):
            return row_of(quantity, group, None, "a gradient is not finite")
        unbias = steps / (steps - 1) if steps > 1 else None
        spread = [None if unbias is None else moment * unbias for moment in moments[2:]]
        seen = signal > 0 and noise > 0
        return row_of(
            quantity,
            group,
            noise / signal if seen else None,
            None if seen else "the mean of |G|² or of tr Σ is not above zero",
            num_steps=steps,
            small_batch_tokens=self.small_batch_tokens,
            big_batch_tokens=self.big_batch_tokens,
            signal=signal,
            noise=noise,
            signal_variance=spread[0],
            noise_variance=spread[1],
            signal_noise_covariance=spread[2],
        )


class GradientNoise(pl.Callback):
    """Listens to the gradients of every micro-batch; `take` gives what they said since it was last asked."""

    _membership: Tensor
    _sequences: int
    _length: int

    def __init__(self, groups: Groups, marks: Collection[int], clocks: Clocks) -> None:
        self._groups, self._clocks = groups, clocks
        self._halved = halved_steps(sorted(marks))
        self._moments: dict[str, Moments] = {}
        self._incoming: dict[int, Tensor] = {}
        self._listeners: list[Any] = []
        self._micro_squares: list[Tensor] = []
        self._own: list[Tensor] = []
        self._half: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        weights = list(pl_module.network.parameters())
        self._membership = membership(self._groups, weights[0].detach().double())
        for moments in self._moments.values():
            moments.sums = moments.sums.to(weights[0].device)
        self._listeners = [
            weight.register_hook(partial(self._incoming.__setitem__, place)) for place, weight in enumerate(weights)
        ]

    def teardown(self, *_: Any, **__: Any) -> None:
        for listener in self._listeners:
            listener.remove()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._sequences, self._length = batch.shape[0], batch.shape[1] - 1
        alone = trainer.accumulate_grad_batches * trainer.world_size == 1 and len(batch) > 1
        if alone and trainer.global_step + 1 in self._halved:
            with self._clocks.use("eval"), trainer.strategy.precision_plugin.train_step_context():
                self._half = gradient_of(pl_module, batch[: len(batch) // 2])

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        """Take up a micro-batch; Lightning has divided its loss by their number."""
        with self._clocks.use("eval"):
            incoming = [self._incoming[place] for place in range(len(self._groups["all"]))]
            if trainer.accumulate_grad_batches > 1:
                self._micro_squares.append(squares(incoming) * trainer.accumulate_grad_batches**2)
            if trainer.world_size > 1:
                self._own = [*torch._foreach_add(self._own, incoming)] if self._own else incoming
            self._incoming.clear()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:  # noqa: ARG002
        with self._clocks.use("eval"):
            whole = [weight.grad for weight in pl_module.network.parameters()]
            self._add_step(trainer, whole)
        self._micro_squares, self._own, self._half = [], [], []

    def _add_step(self, trainer: pl.Trainer, whole: list[Tensor]) -> None:
        micro = self._sequences * self._length
        device = micro * trainer.accumulate_grad_batches
        batch = device * trainer.world_size
        big = self._by_group(squares(whole))
        if self._micro_squares:
            of_micro_batches = torch.stack(self._micro_squares).mean(dim=0)
            self._add("micro_batches", micro, self._mean(trainer, of_micro_batches), batch, big)
        if trainer.world_size > 1:
            self._add("ranks", device, self._mean(trainer, squares(self._own)), batch, big)
        if self._half:
            self._add("halves", *self._of_halves(whole), batch, big)

    def _add(self, estimator: str, small_batch: float, small: Tensor, big_batch: float, big: Tensor) -> None:
        moments = self._moments.setdefault(estimator, Moments(big.new_zeros(5, len(self._groups))))
        moments.add(small_batch, small, big_batch, big)

    def _mean(self, trainer: pl.Trainer, of_rank: Tensor) -> Tensor:
        return cast(Tensor, trainer.strategy.reduce(self._by_group(of_rank), reduce_op="mean"))

    def _of_halves(self, whole: list[Tensor]) -> tuple[float, Tensor]:
        """Return batch and mean square of the two halves; the other one's gradient is what the first leaves.

        Halves that are not equal have the harmonic mean as their batch, as it is 1/B that enters.
        """
        first, other = self._sequences // 2, -(-self._sequences // 2)
        share = first / self._sequences
        rest = torch._foreach_sub(whole, torch._foreach_mul(self._half, share))
        mean = (squares(self._half) + squares(rest) / (1 - share) ** 2) / 2
        return 2 / (1 / first + 1 / other) * self._length, self._by_group(mean)

    def _by_group(self, of_tensors: Tensor) -> Tensor:
        summed: Tensor = self._membership @ of_tensors
        return summed

    def take(self) -> list[Row]:
        """Return the rows of the steps since the last time, and start anew."""
        rows = [row for name, moments in self._moments.items() for row in moments.rows(name, self._groups)]
        if not rows:
            words = "a step has one sequence, or none of the steps since the last mark was halved"
            rows = [row_of("noise_scale_halves", "all", None, words)]
        self._moments = {}
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(vars(moments)) for name, moments in self._moments.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments = {name: Moments(**moments) for name, moments in state_dict.items()}


def gradient_of(module: LanguageModel, sequences: Tensor) -> list[Tensor]:
    """Return the gradient of the loss of some sequences, and leave the one that is being accumulated alone."""
    with torch.enable_grad():
        weights = [weight.detach().requires_grad_() for weight in module.network.parameters()]
        return [*torch.autograd.grad(eager_loss(module, weights, sequences), weights)]


def halved_steps(marks: Sequence[int]) -> frozenset[int]:
    """Return the steps at which a batch may be halved: up to `MOST_HALVES` evenly before each mark, and at it."""
    steps: set[int] = set()
    for before, mark in zip((0, *marks), marks, strict=False):
        stride = -(-(mark - before) // MOST_HALVES) or 1
        steps.update(range(mark, before, -stride))
    return frozenset(steps)
