"""Scion: every parameter steps to the end of a ball in the norm of its layer.

D ← μD + (1−μ)G; W ← (1 − γλ)W − γρ·lmo(D), with ρ the radius of the layer's ball. λ = 1 is the constrained form: W
stays in the ball once it is there. On the hidden matrices it is Muon without Nesterov, with rate γρ and decay 1/ρ.

Source: arXiv 2502.07529 (μ = 1 − α, table 2 for the lmo's).
"""

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from harness.frozen import ADDED_LATER, Frozen, nearest
from harness.optimizers.newton_schulz import (
    NEWTON_SCHULZ_ITERATIONS,
    CoefficientSet,
    Form,
    Iterations,
    Precision,
    newton_schulz_flops,
)
from harness.optimizers.orthogonal import orthogonal_step
from harness.optimizers.rates import DecayRate, NonNegative, Positive
from harness.optimizers.rule import Assignment, Group, Optimizer, Role, Rule, Shape, State, kept, with_gradients
from harness.optimizers.torch_later import Tensor, torch

Lmo = Literal["spectral", "sign", "col_norm", "row_norm", "bias_rms"]

#: Those that a vector has too.
_OF_VECTORS = ("sign", "bias_rms")

_EPSILON = 1e-8


class ScionLayer(Frozen):
    """The ball of a kind of layer. Of a matrix (out, in) as it is stored, lmo(D) is

    `spectral` √(out/in)·UVᵀ; `sign` sign(D)/in; `col_norm` columns of root mean square 1; `row_norm` rows of L2 norm
    1/√in; `bias_rms` the whole at root mean square 1.
    """

    lmo: Lmo
    radius: Positive


class ScionRule(Rule):
    """Scion on one kind of layer: the radius is a multiple of the rate."""

    lmo: Lmo
    momentum: DecayRate
    newton_schulz: CoefficientSet
    newton_schulz_dtype: Precision
    newton_schulz_form: Form
    newton_schulz_iterations: Iterations

    @property
    def algorithm(self) -> str:
        return "scion"

    @property
    def label(self) -> str:
        return f"scion {self.lmo}"

    def options(self, tokens_per_step: int) -> Group:
        return super().options(tokens_per_step) | {"nesterov": False, "scale": "spectral"}

    def state_numbers(self, shape: Shape) -> int:
        return math.prod(shape)

    def flops(self, shape: Shape) -> float:
        if self.lmo != "spectral":
            return 0.0
        return newton_schulz_flops(shape, self.newton_schulz_form, self.newton_schulz_iterations)

    @staticmethod
    def step(group: Group, state: State) -> None:
        if group["lmo"] == "spectral":
            orthogonal_step(group, state)
        else:
            _elementwise_step(group, state)


class ScionConfig(Optimizer):
    """Scion on every parameter, AdamW on none. Source: arXiv 2502.07529.

    `weight_decay: 1` is the constrained form, 0 the unconstrained. Radii are those of the source's nanoGPT, in which
    the embedding is the head.
    Assumption: a separate embedding takes the head's ball; norms, of which the source has none, start on the surface of
    theirs.
    """

    source: ClassVar[str] = "arXiv 2502.07529"

    name: Literal["scion"] = "scion"
    weight_decay: NonNegative = 1.0
    momentum: DecayRate = 0.9
    hidden: ScionLayer = ScionLayer(lmo="spectral", radius=50.0)
    embedding: ScionLayer = ScionLayer(lmo="sign", radius=3000.0)
    head: ScionLayer = ScionLayer(lmo="sign", radius=3000.0)
    norm: ScionLayer = ScionLayer(lmo="bias_rms", radius=1.0)
    newton_schulz: CoefficientSet = "keller"
    newton_schulz_dtype: Precision = "bfloat16"
    newton_schulz_form: Form = "standard"
    newton_schulz_iterations: Annotated[Iterations, ADDED_LATER] = NEWTON_SCHULZ_ITERATIONS

    @model_validator(mode="after")
    def _check_norm(self) -> "ScionConfig":
        if self.norm.lmo not in _OF_VECTORS:
            raise ValueError(f"norm.lmo {self.norm.lmo!r} is one of matrices; {nearest(self.norm.lmo, _OF_VECTORS)}")
        return self

    def assign(self, role: Role, shape: Shape) -> Assignment:
        del shape
        layer: ScionLayer = getattr(self, role)
        return Assignment(self._rule(layer.lmo), layer.radius, self.weight_decay / layer.radius)

    def state_numbers(self, shape: Shape) -> int:
        return self._rule(self.hidden.lmo).state_numbers(shape)

    def flops(self, shape: Shape) -> float:
        return self._rule(self.hidden.lmo).flops(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        ScionRule.step(group, state)

    def _rule(self, lmo: Lmo) -> ScionRule:
        shared = {name: getattr(self, name) for name in ScionRule.model_fields if name != "lmo"}
        return ScionRule(lmo=lmo, **shared)


def _elementwise_step(group: Group, state: State) -> None:
    weights, gradients = with_gradients(group)
    if not weights:
        return
    momenta = kept("momentum", weights, state)
    torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
    torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
    lmo = _LMOS[group["lmo"]]
    torch._foreach_add_(weights, [lmo(momentum) for momentum in momenta], alpha=-group["lr"])


def _column_norm(d: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(d, dim=0, keepdim=True) / math.sqrt(d.shape[0])
    return d / norms.add_(_EPSILON)


def _row_norm(d: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(d, dim=1, keepdim=True) * math.sqrt(d.shape[1])
    return d / norms.add_(_EPSILON)


def _root_mean_square(d: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(d) / math.sqrt(d.numel())
    return d / norm.add_(_EPSILON)


_LMOS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda d: d.sign() / d.shape[-1] if d.ndim > 1 else d.sign(),
    "col_norm": _column_norm,
    "row_norm": _row_norm,
    "bias_rms": _root_mean_square,
}
