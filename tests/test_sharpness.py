"""Sharpness along an update against an explicit Hessian, and its parts against the Hessian's blocks."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from harness.callbacks.diagnostics.eager_loss import eager_loss
from harness.callbacks.diagnostics.sharpness import curvature_of, layer_curvature, layers_of, sharpness_rows
from harness.config import ModelConfig, RunConfig
from harness.model import Transformer
from harness.module import LanguageModel
from harness.shapes import parameters
from tests.runs import TINY

SHAPES = ((3, 4), (3,), (2, 3))
LAYERS = ("first", "norm", "second")


def drawn(shapes: tuple[tuple[int, ...], ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


INPUTS = drawn(((5, 4),), seed=9)[0]


def small_loss(weights: Sequence[Tensor]) -> Tensor:
    return (torch.tanh(INPUTS @ weights[0].T * weights[1]) @ weights[2].T).square().mean()


def blocks(loss: Callable[..., Tensor], weights: list[Tensor], update: list[Tensor]) -> Tensor:
    """⟨Z_l, H_lm Z_m⟩ / |Z|² for every pair of tensors, from the Hessian itself."""
    whole = jacrev(jacrev(loss))(weights)
    size = sum(float(change.square().sum()) for change in update)
    found = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for row, column in itertools.product(range(len(weights)), repeat=2):
        square = whole[row][column].reshape(update[row].numel(), -1)
        found[row, column] = update[row].flatten() @ square @ update[column].flatten() / size
    return found


def test_curvature_of_a_small_network_is_that_of_its_hessian_block_by_block() -> None:
    weights, update = drawn(SHAPES, seed=0), drawn(SHAPES, seed=1)
    expected = blocks(small_loss, weights, update)
    assert torch.allclose(layer_curvature(small_loss, weights, update, LAYERS), expected, rtol=1e-10, atol=1e-12)


def test_tensors_of_one_layer_are_one_block() -> None:
    weights, update = drawn(SHAPES, seed=0), drawn(SHAPES, seed=1)
    expected = blocks(small_loss, weights, update)
    found = layer_curvature(small_loss, weights, update, ("both", "both", "second"))
    assert float(found[0, 0]) == pytest.approx(float(expected[:2, :2].sum()))
    assert float(found.sum()) == pytest.approx(float(expected.sum()))


def test_curvature_does_not_see_the_size_of_the_update() -> None:
    weights, update = drawn(SHAPES, seed=0), drawn(SHAPES, seed=1)
    found = layer_curvature(small_loss, weights, update, LAYERS)
    smaller = [1e-5 * change for change in update]
    assert torch.allclose(layer_curvature(small_loss, weights, smaller, LAYERS), found)


@pytest.fixture(scope="module", params=["gelu layernorm", "swiglu rmsnorm", "grouped tied"])
def module(request: pytest.FixtureRequest) -> LanguageModel:
    kinds = {
        "gelu layernorm": {"activation": "gelu", "norm": "layernorm"},
        "swiglu rmsnorm": {"activation": "swiglu", "norm": "rmsnorm"},
        "grouped tied": {"kv_heads": 1, "tied_head": True},
    }
    shape = {"width": 8, "layers": 2, "heads": 2, "sequence_length": 8, "vocab_size": 11, "mlp_width": 8}
    corpus = {"source": "python-stdlib"}
    run = TINY | {"model": shape | kinds[request.param], "corpus": corpus, "global_batch_tokens": 16}
    return LanguageModel(RunConfig.parse(run | {"evaluation": {"tokens": 64}}, "tiny"))


def test_curvature_of_a_transformer_is_that_of_its_hessian(module: LanguageModel) -> None:
    module = module.double()
    sequences = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    weights = [weight.detach() for weight in module.network.parameters()]
    update = drawn(tuple(tuple(weight.shape) for weight in weights), seed=3)
    layers = layers_of(module.run.model)

    places = {name: place for place, name in enumerate(dict.fromkeys(layers))}

    def along(shifts: Tensor) -> Tensor:
        tensors = zip(weights, update, layers, strict=True)
        moved = [weight + shifts[places[layer]] * change for weight, change, layer in tensors]
        return eager_loss(module, moved, sequences)

    def second(first: int, other: int, step: float = 1e-5) -> float:
        """The second derivative by two layers' shifts, by central differences of gradients."""
        ahead, behind = torch.zeros(2, len(set(layers)), dtype=torch.float64)
        ahead[other], behind[other] = step, -step
        slopes = [torch.autograd.grad(along(s.requires_grad_()), s)[0][first] for s in (ahead, behind)]
        return float(slopes[0] - slopes[1]) / (2 * step)

    size = sum(float(change.square().sum()) for change in update)
    found = curvature_of(module, weights, update, [sequences[:1], sequences[1:]])
    assert torch.allclose(found, found.T, rtol=1e-6, atol=1e-9)
    for first, other in ((0, 0), (1, 1), (2, 3), (4, 0), (-1, -1)):
        place, beside = first % len(found), other % len(found)
        assert float(found[place, beside]) == pytest.approx(second(place, beside) / size, rel=1e-3, abs=1e-7)


def test_curvature_leaves_the_network_and_its_gradients_alone(module: LanguageModel) -> None:
    module = module.float()
    sequences = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    weights = [weight.detach() + 0.01 for weight in module.network.parameters()]
    before = [weight.clone() for weight in module.network.parameters()]
    module.zero_grad()
    curvature_of(module, weights, [torch.ones_like(weight) for weight in weights], [sequences])
    assert all(weight.grad is None for weight in module.network.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, module.network.parameters(), strict=True))


def test_rows_are_the_sum_of_all_of_the_curvature_its_diagonal_and_their_parts_by_kind(module: LanguageModel) -> None:
    model = module.run.model
    number = len(set(layers_of(model)))
    curvature = torch.arange(number**2, dtype=torch.float64).reshape(number, number)
    rows = {(row["quantity"], row["group"]): row["value"] for row in sharpness_rows(curvature, model)}
    assert rows["sharpness", "all"] == float(curvature.sum())
    assert rows["sharpness_within_layers", "all"] == float(curvature.trace())
    kinds = [group for quantity, group in rows if quantity == "sharpness" and group not in ("all", "hidden")]
    for quantity in ("sharpness", "sharpness_within_layers"):
        assert sum(float(str(rows[quantity, kind])) for kind in kinds) == rows[quantity, "all"]
    hidden = [kind for kind in kinds if "." in kind]
    assert sum(float(str(rows["sharpness", kind])) for kind in hidden) == rows["sharpness", "hidden"]


def test_a_layer_is_a_weight_matrix_and_the_norms_are_one(module: LanguageModel) -> None:
    model: ModelConfig = module.run.model
    names = [name for name, _ in Transformer(model).named_parameters()]
    layers = dict(zip(names, layers_of(model), strict=True))
    assert {layer for name, layer in layers.items() if "norm" in name} == {"norm"}
    matrices = [parameter.name for parameter in parameters(model) if parameter.role != "norm"]
    assert [layers[name] for name in matrices] == matrices
