"""Every optimizer's rule against a float64 reference, written here as its paper writes it, or against PyTorch."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.optimizers.config import OPTIMIZERS
from harness.optimizers.newton_schulz import orthogonalise
from harness.optimizers.rule import Optimizer
from tests.test_optimizers import muon_group, random_weights, reference_newton_schulz, set_gradients

SHAPES = [(16, 16), (16, 16), (32, 8), (8, 32), (1, 7), (12, 5)]
STEPS = 4
Reference = Callable[[Tensor, list[Tensor], Any], Tensor]


def configured(name: str, **settings: Any) -> Optimizer:
    """An optimizer at a rate that moves weights by much; Newton–Schulz, where it has any, in float32."""
    precise = {"newton_schulz_dtype": "float32"} if "newton_schulz_dtype" in OPTIMIZERS[name].model_fields else {}
    return OPTIMIZERS[name].parse({"peak_lr": 0.05, **precise, **settings}, "test")


def trained(config: Optimizer, dtype: torch.dtype, steps: int = STEPS) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the weights after some steps, and their gradients by step."""
    weights = [nn.Parameter(weight.detach().to(dtype)) for weight in random_weights(SHAPES)]
    optimizer, gradients = muon_group(weights, config), []
    for step in range(steps):
        set_gradients(weights, step)
        gradients.append([weight.grad.double() for weight in weights if weight.grad is not None])
        optimizer.step()
    return [weight.detach().double() for weight in weights], gradients


def assert_equals_reference(config: Optimizer, reference: Reference, dtype: torch.dtype, tolerance: float) -> None:
    weights, gradients = trained(config, dtype)
    for number, (weight, start) in enumerate(zip(weights, random_weights(SHAPES), strict=True)):
        expected = reference(start.detach().double(), [each[number] for each in gradients], config)
        assert torch.allclose(weight, expected, rtol=0, atol=tolerance), (weight.shape, (weight - expected).abs().max())
        assert (expected - start.detach()).abs().max() > 1000 * tolerance, (
            "the reference hardly moved: nothing is tested"
        )


def muon_directions(gradients: list[Tensor], config: Any) -> list[Tensor]:
    """Orthogonalised momenta, one a step; heavy-ball form, which has the same direction."""
    momentum, directions = torch.zeros_like(gradients[0]), []
    for gradient in gradients:
        momentum = config.momentum * momentum + gradient
        ahead = gradient + config.momentum * momentum if config.nesterov else momentum
        directions.append(reference_newton_schulz(ahead, config.newton_schulz))
    return directions


def scale_of(shape: tuple[int, ...], name: str) -> float:
    out, into = shape
    return {
        "original": max(1.0, out / into) ** 0.5,
        "match_rms_adamw": 0.2 * max(out, into) ** 0.5,
        "spectral": (out / into) ** 0.5,
    }[name]


def muon_plus(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    for direction in muon_directions(gradients, config):
        update = direction
        for name in config.norm.split("_"):
            update = update / update.norm(dim={"col": 0, "row": 1}[name], keepdim=True)
        if config.renorm:
            update = update * min(weight.shape) ** 0.5 / update.norm()
        weight = weight - config.peak_lr * config.weight_decay * weight
        weight = weight - config.peak_lr * scale_of(weight.shape, config.scale) * update
    return weight


def normuon(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    second = torch.zeros(weight.shape[0], 1, dtype=torch.float64)
    for direction in muon_directions(gradients, config):
        second = config.beta2 * second + (1 - config.beta2) * (direction**2).mean(dim=1, keepdim=True)
        update = direction / (second**0.5 + 1e-10)
        if config.length == "kept":
            update = update * direction.norm() / update.norm() * scale_of(weight.shape, config.scale)
        else:
            update = update * 0.2 * math.sqrt(weight.numel()) / update.norm()
        weight = (1 - config.peak_lr * config.weight_decay) * weight - config.peak_lr * update
    return weight


def orscale(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    coefficient = getattr(config, "coefficient", None)
    for direction in muon_directions(gradients, config):
        step = config.weight_decay * weight + scale_of(weight.shape, config.scale) * direction
        if coefficient is None:
            coefficient = weight.norm() / step.norm()
        ratio = float(weight.norm() / (coefficient * step.norm() + 1e-6))
        low, high = config.ratio_bounds
        weight = weight - config.peak_lr * min(max(ratio, low), high) * step
    return weight


def mona(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    beta, alpha = config.slow_beta, -1 / (2 * (1 - config.slow_beta))
    acceleration, before, pushed = torch.zeros_like(weight), torch.zeros_like(weight), []
    for gradient in gradients:
        acceleration = beta * acceleration + (1 - beta) * (gradient - before)
        pushed.append(gradient + alpha * acceleration)
        before = gradient
    for direction in muon_directions(pushed, config):
        weight = (1 - config.peak_lr * config.weight_decay) * weight
        weight = weight - config.peak_lr * scale_of(weight.shape, config.scale) * direction
    return weight


def scion(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    d, alpha = torch.zeros_like(weight), 1 - config.momentum
    out, into = weight.shape
    for gradient in gradients:
        d = (1 - alpha) * d + alpha * gradient
        end = {
            "spectral": lambda d: (out / into) ** 0.5 * reference_newton_schulz(d, config.newton_schulz),
            "sign": lambda d: d.sign() / into,
            "col_norm": lambda d: d / d.pow(2).mean(dim=0).sqrt(),
            "row_norm": lambda d: d / (d.norm(dim=1, keepdim=True) * into**0.5),
            "bias_rms": lambda d: d / d.pow(2).mean().sqrt(),
        }[config.hidden.lmo](d)
        decayed = (1 - config.peak_lr) * weight if config.weight_decay else weight
        weight = decayed - config.peak_lr * config.hidden.radius * end
    return weight


def lamb(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    beta1, beta2 = config.betas
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        r = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + config.eps)
        update = r + config.weight_decay * weight
        weight = weight - config.peak_lr * weight.norm() / update.norm() * update
    return weight


def lars(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    momentum, decay = torch.zeros_like(weight), config.weight_decay
    for gradient in gradients:
        norms = gradient.norm() + decay * weight.norm() + config.eps
        local = config.trust_coefficient * weight.norm() / norms
        momentum = config.momentum * momentum + local * (gradient + decay * weight)
        weight = weight - config.peak_lr * momentum
    return weight


def lion(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    (beta1, beta2), momentum = config.betas, torch.zeros_like(weight)
    for gradient in gradients:
        sign = (beta1 * momentum + (1 - beta1) * gradient).sign()
        weight = weight - config.peak_lr * (sign + config.weight_decay * weight)
        momentum = beta2 * momentum + (1 - beta2) * gradient
    return weight


@pytest.mark.parametrize(
    ("name", "settings", "reference"),
    [
        *[("muon_plus", {"norm": norm}, muon_plus) for norm in ("col", "row", "col_row", "row_col")],
        ("muon_plus", {"renorm": True, "scale": "match_rms_adamw"}, muon_plus),
        ("normuon", {}, normuon),
        ("normuon", {"nesterov": False, "length": "rms"}, normuon),
        ("orscale", {"coefficient": 2.0}, orscale),
        ("orscale", {"ratio_bounds": [0.5, 0.6]}, orscale),
        ("orscale_lm", {}, orscale),
        ("mona", {}, mona),
        ("mona", {"slow_beta": 0.5, "nesterov": False}, mona),
        ("scion", {"hidden": {"lmo": "spectral", "radius": 2.0}}, scion),
        ("scion", {"hidden": {"lmo": "spectral", "radius": 2.0}, "weight_decay": 0.0}, scion),
    ],
)
def test_rule_of_orthogonalised_updates_equals_its_reference(
    name: str, settings: dict[str, Any], reference: Reference
) -> None:
    assert_equals_reference(configured(name, **settings), reference, torch.float32, tolerance=5e-5)


@pytest.mark.parametrize(
    ("name", "settings", "reference"),
    [
        *[
            ("scion", {"hidden": {"lmo": lmo, "radius": 3.0}}, scion)
            for lmo in ("sign", "col_norm", "row_norm", "bias_rms")
        ],
        ("lamb", {}, lamb),
        ("lamb", {"weight_decay": 0.5, "betas": [0.5, 0.9]}, lamb),
        ("lars", {"peak_lr": 10.0}, lars),
        ("lars", {"peak_lr": 10.0, "weight_decay": 0.5, "momentum": 0.5}, lars),
        ("lion", {}, lion),
    ],
)
def test_elementwise_rule_equals_its_reference_in_float64(
    name: str, settings: dict[str, Any], reference: Reference
) -> None:
    tolerance = 5e-7 if settings.get("hidden") else 1e-12  # an ε of 1e-8 keeps the lmo's from dividing by zero
    assert_equals_reference(configured(name, **settings), reference, torch.float64, tolerance)


def soap(weight: Tensor, gradients: list[Tensor], config: Any) -> Tensor:
    """Adam in the exact eigenbasis of the averages so far, refreshed at every step."""
    beta1, beta2 = config.betas
    left, right = (1 - beta2) * gradients[0] @ gradients[0].T, (1 - beta2) * gradients[0].T @ gradients[0]
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    q_left, q_right = (torch.linalg.eigh(each)[1].flip(1) for each in (left, right))
    for step, gradient in enumerate(gradients[1:], start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * (q_left.T @ gradient @ q_right) ** 2
        turned = q_left.T @ m @ q_right / (1 - beta1**step)
        update = q_left @ (turned / ((v / (1 - beta2**step)).sqrt() + config.eps)) @ q_right.T
        weight = (1 - config.peak_lr * config.weight_decay) * weight - config.peak_lr * update
        left = beta2 * left + (1 - beta2) * gradient @ gradient.T
        right = beta2 * right + (1 - beta2) * gradient.T @ gradient
        q_left, v = one_power_iteration(left, q_left, v, dimension=0)
        q_right, v = one_power_iteration(right, q_right, v, dimension=1)
    return weight


def one_power_iteration(product: Tensor, q: Tensor, v: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors by decreasing Rayleigh quotient, by Gram–Schmidt of the product with them; v in the same order."""
    order = sorted(range(len(q)), key=lambda i: -float(q[:, i] @ product @ q[:, i]))
    columns: list[Tensor] = []
    for i in order:
        column = product @ q[:, i]
        for _ in range(2):  # twice is enough
            column = column - sum((float(column @ other) * other for other in columns), torch.zeros_like(column))
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1), v.index_select(dimension, torch.tensor(order))


def test_soap_equals_its_reference_in_float64() -> None:
    """On square matrices: in the null space of a product the eigenvectors are anyone's choice."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    start, config = weight.detach().clone(), configured("soap", weight_decay=0.3, refresh_every_steps=1)
    optimizer = muon_group([weight], config)
    gradients = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(6)]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(weight, soap(start, gradients, config), rtol=0, atol=1e-9)


def test_soap_refreshes_its_basis_as_often_as_it_says() -> None:
    weight = random_weights([(6, 6)])
    optimizer = muon_group(weight, configured("soap", refresh_every_steps=3))
    bases = []
    for step in range(8):
        set_gradients(weight, step)
        optimizer.step()
        bases.append(optimizer.state[weight[0]]["left_vectors"].clone())
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True, False]


def test_soap_leaves_a_long_side_as_it_is() -> None:
    weight = random_weights([(6, 40)])
    set_gradients(weight, 0)
    optimizer = muon_group(weight, configured("soap", max_side=10))
    optimizer.step()
    assert {name for name in optimizer.state[weight[0]] if "vectors" in name} == {"left_vectors"}


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_equals_torch_sgd_bit_for_bit(nesterov: bool) -> None:
    ours, theirs = random_weights(SHAPES), random_weights(SHAPES)
    optimizer = muon_group(ours, configured("sgd", nesterov=nesterov, weight_decay=0.1))
    reference = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    for step in range(STEPS):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("coefficients", "error"), [("keller", 0.33), ("quintic", 0.04), ("polar_express", 0.15)])
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_orthogonalise_gives_the_polar_factor_of_the_singular_value_decomposition(
    coefficients: str, error: float, form: Any, shape: tuple[int, int]
) -> None:
    """Singular vectors are kept; singular values are as near to one as the polynomials bring those in [.01, 1]."""
    left, _, right = torch.linalg.svd(random_weights([shape])[0].detach(), full_matrices=False)
    matrix = 5 * left @ torch.diag(torch.logspace(-1, 0, min(shape))) @ right
    ((result,),) = orthogonalise([matrix], coefficients, "float32", form)
    assert float(torch.linalg.matrix_norm(result - left @ right, ord=2)) <= error
    inside = left.T @ result @ right.T
    assert float((inside - inside.diagonal().diag()).abs().max()) < 1e-3


def test_scion_constrained_is_spectral_muon_without_nesterov() -> None:
    """With γ_muon = γρ and λ = 1/ρ."""
    radius, rate = 20.0, 2**-8
    scions, muons = random_weights(SHAPES), random_weights(SHAPES)
    layer = {"lmo": "spectral", "radius": radius}
    ours = muon_group(scions, configured("scion", peak_lr=rate, momentum=0.9, hidden=layer))
    settings = {"momentum": 0.9, "nesterov": False, "scale": "spectral", "weight_decay": 1 / radius}
    muon = muon_group(muons, configured("muon", peak_lr=rate * radius, **settings))
    for step in range(STEPS):
        set_gradients(scions, step)
        set_gradients(muons, step)
        ours.step()
        muon.step()
    assert all(torch.equal(mine, other) for mine, other in zip(scions, muons, strict=True))


def test_mona_averages_the_gradient_with_the_slow_average_of_those_before() -> None:
    """G + αA = (G + E)/2 with α = −1/(2(1−β)), where E is the moving average up to the step before."""
    generator, beta = torch.Generator().manual_seed(0), 0.99
    acceleration = average = before = torch.zeros(50, dtype=torch.float64)
    for _ in range(300):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        acceleration = beta * acceleration + (1 - beta) * (gradient - before)
        pushed = gradient - acceleration / (2 * (1 - beta))
        assert torch.allclose(pushed, (gradient + average) / 2, rtol=0, atol=1e-13)
        average, before = beta * average + (1 - beta) * gradient, gradient


def test_orscale_lm_starts_as_muon() -> None:
    """Its ratio is one on the first step, so that λW + s·O is subtracted as Muon does."""
    ours, _ = trained(configured("orscale_lm"), torch.float32, steps=1)
    muons, _ = trained(configured("muon"), torch.float32, steps=1)
    assert all(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(ours, muons, strict=True))


@pytest.mark.parametrize("norm", ["col", "row", "col_row", "row_col"])
def test_muon_plus_with_renorm_has_the_norm_of_an_orthogonal_matrix(norm: str) -> None:
    config = configured("muon_plus", norm=norm, renorm=True, weight_decay=0.0)
    weights, _ = trained(config, torch.float32, steps=1)
    for weight, start in zip(weights, random_weights(SHAPES), strict=True):
        out, into = weight.shape
        length = float((weight - start.detach()).norm()) / config.peak_lr / (out / into) ** 0.5
        assert length == pytest.approx(min(out, into) ** 0.5, rel=1e-5)


def test_lars_and_lamb_move_a_zero_matrix() -> None:
    """A ratio of zero would hold it at zero for ever."""
    for name in ("lamb", "lars"):
        weight = nn.Parameter(torch.zeros(4, 4))
        weight.grad = torch.ones(4, 4)
        muon_group([weight], configured(name)).step()
        assert float(weight.detach().abs().min()) > 0, name
