"""The LightningModule: loss, learning rate and clipping of one run. What is measured lives in `callbacks`."""

from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from harness.branches import begin_branch
from harness.config import RunConfig
from harness.model import Transformer
from harness.optimizers.combined import CombinedOptimizer, build_optimizer
from harness.schedule import learning_rate_factor


class LanguageModel(pl.LightningModule):
    """A `Transformer` trained on sequences (B, T + 1): tokens 0 … T−1 predict tokens 1 … T."""

    train_loss_sum: Tensor

    def __init__(self, run: RunConfig) -> None:
        super().__init__()
        self.run = run
        self.network = Transformer(run.model)
        self.network.initialise(run.init_seed)
        # in the state, so that a resumed run reports the same mean; float64, in which sums of float32 losses are exact,
        # so that their order does not show
        self.register_buffer("train_loss_sum", torch.zeros((), dtype=torch.float64))
        #: what the micro-batches of the present batch weigh in that sum: one of the run's last batch weighs 1
        self.train_loss_weight = 1.0

    def training_step(self, sequences: Tensor, _: int) -> Tensor:
        loss = self.loss(sequences)
        self.train_loss_sum.add_(loss.detach(), alpha=self.train_loss_weight)
        return loss

    def loss(self, sequences: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        return cross_entropy(self.network(sequences[:, :-1]), sequences)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        inner = cast(CombinedOptimizer, optimizer)
        step = self.trainer.global_step + 1
        inner.set_learning_rate(self.learning_rate(step))
        if self.run.batch_warmup is not None:
            inner.follow_batch(self.run.clock, step)
        if self.run.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.run.max_grad_norm)

    def learning_rate(self, step: int) -> float:
        return self.run.optimizer.peak_lr * learning_rate_factor(step, self.run)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run_id"] = self.run.run_id

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        made_by, branch = checkpoint.get("run_id"), self.run.branch
        if branch is not None and made_by == branch.parent:
            begin_branch(checkpoint)
        elif made_by != self.run.run_id:
            raise ValueError(f"the checkpoint is one of {made_by}, not of {self.run.run_id}; remove it to start anew")

    def configure_optimizers(self) -> Any:
        return build_optimizer(self.network, self.run.model, self.run.optimizer, self.run.global_batch_tokens)


def cross_entropy(logits: Tensor, sequences: Tensor) -> Tensor:
    """Return the mean loss in nats per token of the logits (B, T, V) of all tokens of (B, T + 1) but the last."""
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(at_least_float32), sequences[:, 1:].flatten())
