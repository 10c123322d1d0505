"""On which devices a run trains, how their gradients become one, and how they share the optimizer's work."""

import inspect
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, distributed
from torch.futures import Future, collect_all
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from harness.config import MachineConfig
from harness.optimizers.combined import CombinedOptimizer
from harness.provenance import uses_gpu

#: PyTorch 2.13 gave the argument a new name.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def strategy(machine: MachineConfig) -> Strategy:
    """Return one device, or data-parallel training over several; buffers are each process's own business."""
    if machine.devices == 1:
        return SingleDeviceStrategy(torch.device("cuda", 0) if uses_gpu(machine) else torch.device("cpu"))
    order_shows = machine.devices > 2 and not uses_gpu(machine)  # on a GPU it does anyway
    parallel = ExactStrategy if order_shows else SharingStrategy
    options: dict[str, Any] = {"gradient_as_bucket_view": True, _SYNC_BUFFERS: False}
    return parallel(**options)


class SharingStrategy(DDPStrategy):
    """Shares the matrices out that the optimizer multiplies; a checkpoint holds the state of all of them."""

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            cast(CombinedOptimizer, optimizer).share_out(self.global_rank, self.world_size)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state on the first process, the one that writes it. `Trainer.save_checkpoint` asks for it on
        all of them.
        """
        return cast(CombinedOptimizer, optimizer).whole_state_dict()


class ExactStrategy(SharingStrategy):
    """Averages the gradient of every tensor by itself.

    PyTorch does it in buckets, which it lays out anew after the first step of a process; where a number lies in its
    bucket decides in which order three or more processes add it up. A resumed run would differ in the last bits.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(None, _average_each)


def _average_each(_: None, bucket: distributed.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    works: list[Any] = [
        distributed.all_reduce(gradient.div_(distributed.get_world_size()), async_op=True)
        for gradient in bucket.gradients()
    ]
    return collect_all([work.get_future() for work in works]).then(lambda _: bucket.buffer())
