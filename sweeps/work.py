"""What one run costs, before it runs: steps, tokens, FLOPs, memory."""

from dataclasses import dataclass

from harness.batch_plan import plan_batch
from harness.config import MachineConfig, RunConfig
from harness.flops import count_parameters, forward_backward_flops_per_token, optimizer_flops_per_step
from harness.memory import DeviceMemory, checkpoint_bytes, device_memory
from harness.schedule import evaluation_marks

#: Model, optimizer, precision and micro-batch: what decides how long a step takes.
Kind = tuple[str, str, str, int]


@dataclass(frozen=True)
class Work:
    """What one run does; runs that differ in learning rate or seed alone do the same work."""

    model: str
    optimizer: str
    precision: str
    global_batch_tokens: int
    realized_tokens: int
    steps: int
    warmup_tokens: int
    micro_batch_tokens: int
    accumulation: int
    num_params: int
    train_flops: float
    evaluation_tokens: int
    evaluation_flops: float
    checkpoint_bytes: int
    device_memory_bytes: DeviceMemory

    @property
    def kind(self) -> Kind:
        return self.model, self.optimizer, self.precision, self.micro_batch_tokens

    @property
    def flops(self) -> float:
        return self.train_flops + self.evaluation_flops

    @property
    def warmup_share(self) -> float:
        return self.warmup_tokens / self.realized_tokens

    @property
    def evaluation_share(self) -> float:
        """Evaluation's part of all FLOPs of the run."""
        return self.evaluation_flops / self.flops


def work_of(run: RunConfig, machine: MachineConfig) -> Work:
    """Return the work of one run. Raises: ValueError when its batch cannot be split over the machine exactly."""
    split = plan_batch(
        run.global_batch_tokens, run.model.sequence_length, machine.devices, machine.max_micro_batch_tokens
    )
    flops_per_token = forward_backward_flops_per_token(run.model)
    evaluations = len(evaluation_marks(run.evaluation, run.global_batch_tokens, run.steps))
    weights_evaluated = 1 if run.averaging.kind == "none" else 2
    evaluation_tokens = evaluations * weights_evaluated * run.evaluation.tokens
    return Work(
        model=run.model_name,
        optimizer=run.optimizer.name,
        precision=run.precision,
        global_batch_tokens=run.global_batch_tokens,
        realized_tokens=run.realized_tokens,
        steps=run.steps,
        warmup_tokens=run.warmup_effective_tokens,
        micro_batch_tokens=split.micro_batch_tokens,
        accumulation=split.accumulation,
        num_params=count_parameters(run.model),
        train_flops=run.realized_tokens * flops_per_token
        + run.steps * optimizer_flops_per_step(run.model, run.optimizer),
        evaluation_tokens=evaluation_tokens,
        evaluation_flops=evaluation_tokens * flops_per_token / 3,  # forward is a third of forward and backward
        checkpoint_bytes=checkpoint_bytes(run),
        device_memory_bytes=device_memory(run, split.micro_batch_tokens),
    )
