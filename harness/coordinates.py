"""Coordinate check of one run: how large activations, their changes and the effects of updates are, layer by layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.batch_clock import BatchClock
from harness.batch_plan import plan_run
from harness.config import RunConfig
from harness.corpus import Corpus
from harness.data import MicroBatches
from harness.model import Transformer
from harness.optimizers.combined import build_optimizer
from harness.schedule import learning_rate_factor
from harness.shapes import parameters
from harness.shards import open_shard


class LayerSizes(NamedTuple):
    """Root mean squares over the outputs of one matrix, before any norm: h itself after the last step, its change
    since the start, and the part of that which the matrix' own update makes, ΔW·x.
    """

    layer: str
    role: str
    activation_rms: float
    change_rms: float
    update_rms: float


class _Pass(NamedTuple):
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def layer_sizes(run: RunConfig, corpus: Corpus) -> list[LayerSizes]:
    """Train the steps of `run` on the CPU, and compare a batch that follows them before and after.

    Source: arXiv 2203.03466, appendix D.1 (coordinate checking); arXiv 2310.17813, condition 1 (ΔW·x).
    """
    network = Transformer(run.model)
    network.initialise(run.init_seed)
    *batches, probe = _batches(run, corpus)
    weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    before = _forward(network, probe)
    _train(network, run, batches)
    after = _forward(network, probe)
    return [
        LayerSizes(
            layer=(name := parameter.name.removesuffix(".weight")),
            role=parameter.role,
            activation_rms=_rms(after.outputs[name]),
            change_rms=_rms(after.outputs[name] - before.outputs[name]),
            update_rms=_rms(_product(weight.detach() - weights[parameter.name], after.inputs[name])),
        )
        for parameter, weight in zip(parameters(run.model), network.parameters(), strict=True)
        if parameter.role != "norm"
    ]


def _batches(run: RunConfig, corpus: Corpus) -> list[Tensor]:
    """Return the training batches of all steps, and one more."""
    batch, steps = run.global_batch_tokens, run.steps + 1
    plan = plan_run(BatchClock(batch, steps * batch), run.model.sequence_length, 1, batch)
    stream = MicroBatches(open_shard(corpus.folder, "train"), plan, run.data_seed)
    return [stream[step] for step in range(run.steps + 1)]


def _train(network: Transformer, run: RunConfig, batches: Sequence[Tensor]) -> None:
    optimizer = build_optimizer(network, run.model, run.optimizer, run.global_batch_tokens)
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        logits = network(batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.set_learning_rate(run.optimizer.peak_lr * learning_rate_factor(step, run))
        optimizer.step()


@torch.no_grad()
def _forward(network: Transformer, batch: Tensor) -> _Pass:
    seen = _Pass({}, {})
    layers = [(name, each) for name, each in network.named_modules() if isinstance(each, nn.Linear | nn.Embedding)]
    hooks = [layer.register_forward_hook(_keeping(name, seen)) for name, layer in layers]
    network(batch[:, :-1])
    for hook in hooks:
        hook.remove()
    return seen


def _keeping(name: str, seen: _Pass) -> Any:
    def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs[name], seen.outputs[name] = given[0], output

    return keep


def _product(weight: Tensor, given: Tensor) -> Tensor:
    """Return what a matrix makes of inputs (…, in), or of token ids."""
    return F.linear(given, weight) if given.is_floating_point() else weight[given]


def _rms(tensor: Tensor) -> float:
    return cast(float, tensor.double().square().mean().sqrt().item())
