"""Normalized directional sharpness of an update Z: ⟨Z, HZ⟩ / |Z|², H the Hessian of the loss where the step was taken.

With Ẑ = Z / |Z| cut into layers, the loss at the weights plus Σ_l ε_l Ẑ_l is a function of as many numbers as there
are layers. Its Hessian at ε = 0 is C_lm = ⟨Ẑ_l, H_lm Ẑ_m⟩: the sum of all of C is the sharpness, its diagonal what
comes from within layers, the rest what layers do to each other. Each row is a Hessian-vector product in float32.

Cost: a forward and backward pass, and about two more for each layer, over the tokens that it is measured on.
Attention is computed by the plain product, which can be differentiated twice.

Source: arXiv 2606.04662. Assumption: a layer there is a weight matrix; the norms together are taken as one more.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.callbacks.diagnostics.eager_loss import eager_loss
from harness.callbacks.diagnostics.groups import kind_of
from harness.callbacks.diagnostics.rows import Row, row_of
from harness.config import ModelConfig
from harness.module import LanguageModel
from harness.shapes import Parameter, parameters


def layers_of(model: ModelConfig) -> list[str]:
    """Return the layer of each tensor: its own name, but `norm` for all norms."""
    return ["norm" if parameter.role == "norm" else parameter.name for parameter in parameters(model)]


def curvature_of(
    module: LanguageModel, weights: Sequence[Tensor], update: Sequence[Tensor], batches: Sequence[Tensor]
) -> Tensor:
    """Return C (layers, layers) of the mean loss over batches of sequences."""
    layers, whole = layers_of(module.run.model), sum(map(len, batches))
    parts = [
        layer_curvature(partial(eager_loss, module, sequences=batch.to(module.device)), weights, update, layers)
        * (len(batch) / whole)
        for batch in batches
    ]
    return torch.stack(parts).sum(dim=0)


def layer_curvature(
    loss: Callable[[Sequence[Tensor]], Tensor],
    weights: Sequence[Tensor],
    update: Sequence[Tensor],
    layers: Sequence[str],
) -> Tensor:
    """Return C (layers, layers), float64, in the order in which layers first occur; `loss` is a function of weights."""
    places = {name: place for place, name in enumerate(dict.fromkeys(layers))}
    size = torch.stack(torch._foreach_norm([*update])).norm()
    directions = torch._foreach_div([*update], size)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        shift = torch.zeros(len(places), dtype=weights[0].dtype, device=weights[0].device, requires_grad=True)
        moved = [
            weight + shift[places[layer]] * direction
            for weight, direction, layer in zip(weights, directions, layers, strict=True)
        ]
        (slopes,) = torch.autograd.grad(loss(moved), shift, create_graph=True)
        rows = [torch.autograd.grad(slope, shift, retain_graph=True)[0] for slope in slopes]
    return torch.stack(rows).double()


def sharpness_rows(curvature: Tensor, model: ModelConfig) -> Iterator[Row]:
    """Yield what the record says: the sum of C and that of its diagonal, and of both the part of each kind of layer."""
    kinds = _kinds(model)
    parts = {"sharpness": curvature.sum(dim=1), "sharpness_within_layers": curvature.diagonal()}
    for quantity, of_layers in parts.items():
        for group in ("all", "hidden", *dict.fromkeys(kind for kind, _ in kinds)):
            own = [value for value, names in zip(of_layers.tolist(), kinds, strict=True) if group in ("all", *names)]
            yield row_of(quantity, group, sum(own))


def _kinds(model: ModelConfig) -> list[tuple[str, str]]:
    """Return the kind of each layer, and whether that is a hidden one."""
    first: dict[str, Parameter] = {}
    for layer, parameter in zip(layers_of(model), parameters(model), strict=True):
        first.setdefault(layer, parameter)
    return [(kind_of(parameter), parameter.role) for parameter in first.values()]
