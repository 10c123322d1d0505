"""Bytes that a run takes on each device and on disk, counted from its shapes; imports no torch.

Shapes: D width, K width of keys and values over all heads, F width of the MLP, V vocabulary.
"""

from dataclasses import dataclass
from functools import cache

from harness.config import ModelConfig, RunConfig
from harness.flops import count_parameters, most_optimizer_state_bytes, optimizer_state_bytes

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device at the peak of a step, without what the libraries themselves take.

    `copies` are those of the weights: their average, and one more while an evaluation or its probe needs it.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer_state + self.copies + self.activations


def device_memory(run: RunConfig, micro_batch_tokens: int, num_devices: int) -> DeviceMemory:
    """Return what a run takes on the fullest of its devices; each holds the whole model, and its share of the state of
    the matrices that are shared out.
    """
    weights = FLOAT32 * count_parameters(run.model)
    return DeviceMemory(
        parameters=weights,
        gradients=weights,
        optimizer_state=most_optimizer_state_bytes(run.model, run.optimizer, num_devices),
        copies=weights * (1 if run.averaging.kind == "none" else 2),
        activations=micro_batch_tokens * activation_bytes_per_token(run.model, run.precision),
    )


def checkpoint_bytes(run: RunConfig) -> int:
    """Return the bytes of a checkpoint: weights, their average, and the optimizer's state, in float32."""
    copies = 1 if run.averaging.kind == "none" else 2
    return copies * FLOAT32 * count_parameters(run.model) + optimizer_state_bytes(run.model, run.optimizer)


@cache
def activation_bytes_per_token(model: ModelConfig, precision: str) -> int:
    """Return the bytes per token that forward keeps for backward, with the largest that comes on top for a moment:
    the log-probabilities with two gradients, or what backward works with in an MLP.

    Of each block: the inputs of both norms (RMSNorm keeps the normalised one too) in float32; the inputs of the
    matrices, queries, keys, values and what attention returns, in the precision of the products, where autocast makes a
    copy for each matrix that reads it; the norms of queries and keys. Attention scores are never whole in memory.

    Assumption: PyTorch's kernels on a processor, without compilation; fused ones keep less. What its allocator loses to
    fragments is not counted: a process was seen to grow by up to half as much again.
    """
    product = BFLOAT16 if precision == "bf16" else FLOAT32
    gated = model.activation == "swiglu"
    in_norm = FLOAT32 * model.width * (2 if model.norm == "rmsnorm" else 1)
    heads = 2 * model.width + 2 * _kv_width(model)
    matrix_inputs = (5 + gated if precision == "bf16" else 3) * model.width
    block = 2 * in_norm + product * (matrix_inputs + heads + (4 if gated else 2) * model.mlp_width)
    if model.qk_norm:
        block += heads // 2 * (2 * FLOAT32 if model.norm == "rmsnorm" else product)
    for_a_moment = max(3 * FLOAT32 * model.known_vocab_size, 3 * product * model.mlp_width)
    return model.layers * block + in_norm + product * model.width + for_a_moment


def _kv_width(model: ModelConfig) -> int:
    return model.kv_heads * model.head_width
