"""The parameters of a model by name, role and shape, without torch: what plans count and what a test holds the
modules to.

Roles: `embedding`, `hidden` (the matrices between embedding and head), `head`, `norm`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from harness.config import ModelConfig
from harness.optimizers.rule import Role


class Parameter(NamedTuple):
    """One tensor; a matrix is (out, in) as in `nn.Linear`."""

    name: str
    role: Role
    shape: tuple[int, ...]


def parameters(model: ModelConfig) -> list[Parameter]:
    """List all parameters in the order of the module."""
    width, vocabulary = model.width, model.known_vocab_size
    listed = [Parameter("embedding.weight", "embedding", (vocabulary, width))]
    for layer in range(model.layers):
        listed += _block(model, f"blocks.{layer}")
    listed.append(Parameter("final_norm.weight", "norm", (width,)))
    if not model.tied_head:
        listed.append(Parameter("head.weight", "head", (vocabulary, width)))
    return listed


def _block(model: ModelConfig, block: str) -> Iterator[Parameter]:
    width, kv_width, mlp_width = model.width, model.kv_heads * model.head_width, model.mlp_width
    yield Parameter(f"{block}.attention_norm.weight", "norm", (width,))
    yield Parameter(f"{block}.attention.query.weight", "hidden", (width, width))
    yield Parameter(f"{block}.attention.key.weight", "hidden", (kv_width, width))
    yield Parameter(f"{block}.attention.value.weight", "hidden", (kv_width, width))
    yield Parameter(f"{block}.attention.output.weight", "hidden", (width, width))
    if model.qk_norm:
        yield Parameter(f"{block}.attention.query_norm.weight", "norm", (model.head_width,))
        yield Parameter(f"{block}.attention.key_norm.weight", "norm", (model.head_width,))
    yield Parameter(f"{block}.mlp_norm.weight", "norm", (width,))
    if model.activation == "swiglu":
        yield Parameter(f"{block}.mlp.gate.weight", "hidden", (mlp_width, width))
    yield Parameter(f"{block}.mlp.up.weight", "hidden", (mlp_width, width))
    yield Parameter(f"{block}.mlp.down.weight", "hidden", (width, mlp_width))
