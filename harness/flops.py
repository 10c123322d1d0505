"""Parameters, floating-point operations and optimizer state, counted from the shapes that multiply."""

import math

from harness.config import ModelConfig, RunConfig
from harness.optimizers.rule import Optimizer, Rule
from harness.optimizers.sharing import share_out
from harness.shapes import Parameter, parameters

#: What `forward_backward_flops_per_token` counts, as it is recorded and printed.
FLOPS_CONVENTION = "6 × (hidden + head weights) + 12 × layers × sequence × width"


def count_parameters(model: ModelConfig) -> int:
    """Count all parameters; a tied head counts once."""
    return sum(math.prod(parameter.shape) for parameter in parameters(model))


def count_nonembedding_parameters(model: ModelConfig) -> int:
    """Count the hidden matrices and norms: without embedding and head."""
    return sum(math.prod(p.shape) for p in parameters(model) if p.role in ("hidden", "norm"))


def forward_backward_flops_per_token(model: ModelConfig) -> float:
    """Return FLOPs per token of forward and backward: two for each multiply-add, backward twice the forward.

    Matrices that multiply count 6 per weight (the head also when tied; the embedding is a look-up). Attention scores
    and values count in full, without the saving of the causal half.
    Source: arXiv 2204.02311, appendix B (6N + 12·L·H·Q·T).
    """
    hidden = sum(math.prod(p.shape) for p in parameters(model) if p.role == "hidden")
    head = model.known_vocab_size * model.width
    return 6.0 * (hidden + head) + 12.0 * model.layers * model.sequence_length * model.width


def optimizer_flops_per_step(model: ModelConfig, optimizer: Optimizer) -> float:
    """Return the FLOPs of the optimizer's matrix products in one step.

    Newton–Schulz on an m × n matrix (m ≤ n) takes 4m²n + 2m³ per iteration: of blocks of width d, about 4·d/B of
    forward and backward on B tokens (arXiv 2505.02222 rounds it to 5·d/B). Element-wise work, some tens of operations
    per parameter for every optimizer, is left out.
    """
    return sum((_rule(optimizer, parameter).flops(parameter.shape) for parameter in parameters(model)), 0.0)


def train_flops(run: RunConfig, until_step: int) -> float:
    """Return the FLOPs of a run's own steps up to `until_step`: of a branch, those after its parent's."""
    per_token = forward_backward_flops_per_token(run.model)
    per_step = optimizer_flops_per_step(run.model, run.optimizer)
    spans = run.clock.spans(after=run.first_step, until=until_step)
    return sum((span.steps * (per_token * span.batch_tokens + per_step) for span in spans), 0.0)


def optimizer_state_bytes(model: ModelConfig, optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's whole state in float32, without its step counters."""
    return 4 * sum(_rule(optimizer, parameter).state_numbers(parameter.shape) for parameter in parameters(model))


def most_optimizer_state_bytes(model: ModelConfig, optimizer: Optimizer, num_devices: int) -> int:
    """Return the bytes of state on the device that keeps most of it: all but what matrices keep that are shared out."""
    rules = [(_rule(optimizer, parameter), parameter.shape) for parameter in parameters(model)]
    numbers = [rule.state_numbers(shape) for rule, shape in rules]
    costs = {number: flops for number, (rule, shape) in enumerate(rules) if (flops := rule.flops(shape))}
    shares = [0] * num_devices
    for number, owner in zip(costs, share_out([*costs.values()], num_devices), strict=True):
        shares[owner] += numbers[number]
    return 4 * (sum(numbers) - sum(shares) + max(shares))


def _rule(optimizer: Optimizer, parameter: Parameter) -> Rule:
    return optimizer.assign(parameter.role, parameter.shape).rule
