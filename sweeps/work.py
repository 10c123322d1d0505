"""What one run costs, before it runs: steps, tokens, FLOPs, memory."""

from dataclasses import dataclass

from harness.batch_plan import plan_run
from harness.config import MachineConfig, RunConfig
from harness.flops import count_parameters, forward_backward_flops_per_token, train_flops
from harness.memory import DeviceMemory, checkpoint_bytes, device_memory
from harness.schedule import evaluation_marks

#: Model, optimizer, precision and micro-batch: what decides how long a step takes.
Kind = tuple[str, str, str, int]


@dataclass(frozen=True)
class Work:
    """What one run does; runs that differ in learning rate or seed alone do the same work.

    A branch begins with the `branch_tokens` of its trunk: `steps`, micro-batches, FLOPs and evaluations are its own,
    and so are `trained_tokens`; `realized_tokens` are those of the whole. Of a run with several batches, the
    micro-batch is the largest, and the accumulation that of the last.
    """

    model: str
    optimizer: str
    precision: str
    global_batch_tokens: int
    realized_tokens: int
    branch_tokens: int
    steps: int
    warmup_tokens: int
    micro_batch_tokens: int
    accumulation: int
    micro_batches: int
    num_params: int
    train_flops: float
    evaluation_tokens: int
    evaluation_flops: float
    checkpoint_bytes: int
    kept_states: int
    device_memory_bytes: DeviceMemory

    @property
    def kind(self) -> Kind:
        return self.model, self.optimizer, self.precision, self.micro_batch_tokens

    @property
    def flops(self) -> float:
        return self.train_flops + self.evaluation_flops

    @property
    def trained_tokens(self) -> int:
        return self.realized_tokens - self.branch_tokens

    @property
    def warmup_share(self) -> float:
        return self.warmup_tokens / self.realized_tokens

    @property
    def evaluation_share(self) -> float:
        """Evaluation's part of all FLOPs of the run."""
        return self.evaluation_flops / self.flops


def work_of(run: RunConfig, machine: MachineConfig) -> Work:
    """Return the work of one run. Raises: ValueError when its batch cannot be split over the machine exactly."""
    plan = plan_run(run.clock, run.model.sequence_length, machine.devices, machine.max_micro_batch_tokens)
    flops_per_token = forward_backward_flops_per_token(run.model)
    evaluations = len(evaluation_marks(run.evaluation, run.clock, run.first_step))
    weights_evaluated = 1 if run.averaging.kind == "none" else 2
    evaluation_tokens = evaluations * weights_evaluated * run.evaluation.tokens
    return Work(
        model=run.model_name,
        optimizer=run.optimizer.name,
        precision=run.precision,
        global_batch_tokens=run.global_batch_tokens,
        realized_tokens=run.realized_tokens,
        branch_tokens=run.branch.at_tokens if run.branch else 0,
        steps=run.steps - run.first_step,
        warmup_tokens=run.warmup_effective_tokens,
        micro_batch_tokens=plan.micro_batch_tokens,
        accumulation=plan.final.accumulation,
        micro_batches=plan.micro_batches - plan.micro_batches_before(run.first_step + 1),
        num_params=count_parameters(run.model),
        train_flops=train_flops(run, run.steps),
        evaluation_tokens=evaluation_tokens,
        evaluation_flops=evaluation_tokens * flops_per_token / 3,  # forward is a third of forward and backward
        checkpoint_bytes=checkpoint_bytes(run),
        kept_states=len(run.keep_at_tokens),
        device_memory_bytes=device_memory(run, plan.micro_batch_tokens, machine.devices),
    )
