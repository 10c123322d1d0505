"""Muon and AdamW against PyTorch's own and against a plain reference, and the routing that joins them."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from harness.config import ModelConfig
from harness.model import Transformer
from harness.optimizers.combined import CombinedOptimizer, build_optimizer, route
from harness.optimizers.config import AdamWConfig, HalfLife, MuonConfig, decay_per_step
from harness.optimizers.newton_schulz import COEFFICIENTS, NEWTON_SCHULZ_ITERATIONS, batches, orthogonalise
from harness.optimizers.rule import Optimizer

MODEL = ModelConfig.parse({"width": 32, "layers": 2, "heads": 2, "sequence_length": 16, "vocab_size": 50}, "test")


def reference_newton_schulz(update: Tensor, coefficients: str, iterations: int = 5) -> Tensor:
    """The iteration as it is written down, in float64, one matrix, no batching."""
    of_set, norm_factor = COEFFICIENTS[coefficients]
    triples = [of_set[min(number, len(of_set) - 1)] for number in range(iterations)]
    x = update.double()
    x = x / (torch.linalg.norm(x) * norm_factor)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference_muon(weight: Tensor, gradients: list[Tensor], config: MuonConfig) -> Tensor:
    """Muon as it is written down: momentum, Newton–Schulz, scale and decay, in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    assert isinstance(config.momentum, float)
    for gradient in gradients:
        momentum = config.momentum * momentum + (1 - config.momentum) * gradient.double()
        update = (1 - config.momentum) * gradient.double() + config.momentum * momentum if config.nesterov else momentum
        rows, columns = weight.shape
        scale = {
            "original": math.sqrt(max(1.0, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
            "spectral": math.sqrt(rows / columns),
        }[config.scale]
        orthogonal = reference_newton_schulz(update, config.newton_schulz)
        weight = (1 - config.peak_lr * config.weight_decay) * weight - config.peak_lr * scale * orthogonal
    return weight


def muon_group(weights: list[nn.Parameter], config: Optimizer) -> CombinedOptimizer:
    """All weights by the rule of the hidden matrices."""
    rule, multiplier, decay = config.assign("hidden", (1, 1))
    settings = {"algorithm": rule.algorithm, "lr": config.peak_lr * multiplier, "lr_multiplier": multiplier}
    return CombinedOptimizer([{"params": weights, "weight_decay": decay} | settings | rule.options(1)])


def random_weights(shapes: list[tuple[int, int]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(weights: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.to(weight.dtype, copy=True)
    return gradients


SHAPES = [(32, 32), (32, 32), (128, 32), (32, 128), (32, 128), (16, 32), (1, 7), (200, 256)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_muon_equals_torch_muon_bit_for_bit(scale: Any, nesterov: bool) -> None:
    ours, theirs = random_weights(SHAPES), random_weights(SHAPES)
    config = MuonConfig(peak_lr=0.02, scale=scale, nesterov=nesterov)
    optimizer = muon_group(ours, config)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn=scale
    )
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other), mine.shape


@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
@pytest.mark.parametrize("scale", ["match_rms_adamw", "original", "spectral"])
def test_muon_equals_the_plain_reference(scale: Any, coefficients: Any) -> None:
    config = MuonConfig(peak_lr=0.02, scale=scale, newton_schulz=coefficients, newton_schulz_dtype="float32")
    weights = random_weights(SHAPES)
    initial = [weight.detach().clone() for weight in weights]
    optimizer = muon_group(weights, config)
    gradients = []
    for step in range(3):
        gradients.append(set_gradients(weights, step))
        optimizer.step()
    for number, weight in enumerate(weights):
        expected = reference_muon(initial[number], [g[number] for g in gradients], config)
        assert torch.allclose(weight.double(), expected, atol=2e-4), weight.shape


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("keller", 0.68, 1.14), ("quintic", 0.97, 1.04), ("polar_express", 0.85, 1.15)]
)
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (256, 256)])
def test_orthogonalise_brings_singular_values_near_one(
    coefficients: str, low: float, high: float, shape: tuple[int, int]
) -> None:
    """The ranges are those of the polynomials on [.01, 1]; bfloat16 widens them a little."""
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(-1, 0, min(shape))  # over its Frobenius norm all lie in [.01, 1]
    matrix = left @ torch.diag(values) @ right
    for dtype, slack in (("float32", 0.0), ("bfloat16", 0.03)):
        ((result,),) = orthogonalise([matrix * 7], coefficients, dtype)
        singular = torch.linalg.svdvals(result.float())
        assert float(singular.max()) <= high + slack
        assert float(singular.min()) >= low - slack


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), count=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_orthogonalise_in_a_batch_equals_one_by_one(rows: int, columns: int, count: int) -> None:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    matrices = [torch.randn(rows, columns, generator=generator) for _ in range(count)]
    matrices += [torch.randn(columns, rows, generator=generator)]
    together = [each for stack in orthogonalise(matrices, "keller", "float32") for each in stack]
    for matrix, result in zip(matrices, together, strict=True):
        ((alone,),) = orthogonalise([matrix], "keller", "float32")
        assert torch.allclose(result, alone, atol=1e-5)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        # the polar factor turns the same way: the iteration changes singular values only
        assert float((result * (left @ right)).sum()) >= 0.6 * min(matrix.shape)


def test_orthogonalise_leaves_a_zero_matrix_zero_and_finite() -> None:
    ((zero, one),) = orthogonalise([torch.zeros(8, 8), torch.eye(8)])
    assert torch.equal(zero, torch.zeros(8, 8, dtype=torch.bfloat16))
    assert torch.isfinite(one).all()


def test_batches_join_transposed_shapes_and_keep_large_matrices_apart() -> None:
    matrices = [torch.zeros(shape) for shape in [(8, 32), (32, 8), (8, 8), (512, 512), (512, 512)]]
    assert [len(batch) for batch in batches(matrices)] == [2, 1, 1, 1]


def test_adamw_equals_torch_adamw_bit_for_bit() -> None:
    network, other = Transformer(MODEL), Transformer(MODEL)
    network.initialise(0)
    other.initialise(0)
    config = AdamWConfig(peak_lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = build_optimizer(network, MODEL, config, tokens_per_step=16)
    optimizer.set_learning_rate(0.01)
    matrices = [w for w in other.parameters() if w.ndim > 1]
    norms = [w for w in other.parameters() if w.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(4):
        set_gradients(list(network.parameters()), step)
        set_gradients(list(other.parameters()), step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("config", [AdamWConfig(peak_lr=0.01), MuonConfig(peak_lr=0.01)])
def test_optimizer_leaves_gradients_untouched(config: AdamWConfig | MuonConfig) -> None:
    network = Transformer(MODEL)
    network.initialise(0)
    optimizer = build_optimizer(network, MODEL, config, tokens_per_step=16)
    optimizer.set_learning_rate(0.01)
    gradients = set_gradients(list(network.parameters()), 0)
    optimizer.step()
    for weight, gradient in zip(network.parameters(), gradients, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("config", [AdamWConfig(peak_lr=0.01), MuonConfig(peak_lr=0.01)])
def test_optimizer_state_survives_a_round_trip_bit_for_bit(config: AdamWConfig | MuonConfig) -> None:
    networks = [Transformer(MODEL), Transformer(MODEL)]
    optimizers = []
    for network in networks:
        network.initialise(0)
        optimizers.append(build_optimizer(network, MODEL, config, tokens_per_step=16))
        optimizers[-1].set_learning_rate(0.01)
    first, second = optimizers
    for step in range(3):
        set_gradients(list(networks[0].parameters()), step)
        first.step()
    networks[1].load_state_dict(networks[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for network, optimizer in zip(networks, optimizers, strict=True):
        set_gradients(list(network.parameters()), 3)
        optimizer.step()
    pairs = zip(networks[0].parameters(), networks[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_route_gives_muon_the_hidden_matrices_and_adamw_the_rest() -> None:
    routes = route(MODEL, MuonConfig(peak_lr=0.01, weight_decay=0.1))
    muon = {r.parameter.name for r in routes if r.algorithm == "muon"}
    assert len(muon) == 6 * MODEL.layers
    assert all(name.startswith("blocks.") and "norm" not in name for name in muon)
    decayed = {r.parameter.name for r in routes if r.weight_decay > 0}
    assert decayed == muon | {"embedding.weight", "head.weight"}


def test_auxiliary_rate_is_a_multiple_of_muons() -> None:
    config = MuonConfig.parse({"peak_lr": 0.02, "auxiliary": {"lr_multiplier": 0.5}}, "test")
    optimizer = build_optimizer(Transformer(MODEL), MODEL, config, tokens_per_step=16)
    optimizer.set_learning_rate(0.02)
    rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"muon": 0.02, "adamw": 0.01}


def test_decay_per_step_keeps_the_half_life_in_tokens() -> None:
    rate = HalfLife(half_life_tokens=1000, floor=0.3)
    assert decay_per_step(rate, 1000) == pytest.approx(0.5)
    assert decay_per_step(rate, 100) ** 10 == pytest.approx(0.5)
    assert decay_per_step(rate, 100_000) == 0.3
    assert decay_per_step(0.95, 123) == 0.95


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
def test_fewer_iterations_take_the_first_coefficients_and_more_repeat_the_last(iterations: int, form: Any) -> None:
    matrix = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    (found,) = orthogonalise([matrix], "polar_express", "float32", form, iterations)
    expected = reference_newton_schulz(matrix, "polar_express", iterations)
    assert torch.allclose(found[0].double(), expected, atol=1e-4)
    five = reference_newton_schulz(matrix, "polar_express")
    assert not torch.allclose(found[0].double(), five, atol=1e-4)


def test_every_coefficient_set_has_the_iterations_that_the_flops_count() -> None:
    assert {len(triples) for triples, _ in COEFFICIENTS.values()} == {NEWTON_SCHULZ_ITERATIONS}
