"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners.

L ← βL + (1−β)GGᵀ, R ← βR + (1−β)GᵀG, with eigenvectors Q_L, Q_R; G' = Q_LᵀGQ_R; Adam's second moment v is of G';
W ← (1−γλ)W − γ·Q_L(M'̂/(√v̂ + ε))Q_Rᵀ, with M' the momentum turned into the basis. The eigenvectors are refreshed
every few steps by one step of power iteration and a QR; v follows the order of their eigenvalues. The first gradient
only sets up the basis. Vectors are not turned: plain Adam.

Source: arXiv 2409.11321, algorithms 3 and 4, and its code for the first step and the order.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.optimizers.rates import DecayRate, NonNegative, Positive
from harness.optimizers.rule import Group, Optimizer, Shape, State, advanced, kept, with_gradients
from harness.optimizers.torch_later import Tensor, torch

_SIDES = ("left", "right")


class SoapConfig(Optimizer):
    """SOAP on every parameter. Source: arXiv 2409.11321.

    A side longer than `max_side` is not turned (the vocabulary's, of an embedding). The preconditioners' β is the
    second of `betas`.
    """

    source: ClassVar[str] = "arXiv 2409.11321"

    name: Literal["soap"] = "soap"
    betas: tuple[DecayRate, DecayRate] = (0.95, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    refresh_every_steps: Annotated[int, Field(gt=0)] = 10
    max_side: Annotated[int, Field(gt=0)] = 10_000

    def state_numbers(self, shape: Shape) -> int:
        return 2 * math.prod(shape) + sum(2 * side * side for side in self._turned(shape))

    def flops(self, shape: Shape) -> float:
        """Count a product with Q or of G with itself as 2·out·in·side: three turns and one update of L or R a side.

        Every refresh multiplies (2·side³) and decomposes (about 4/3·side³ for QR, as much for its Q).
        """
        turned = self._turned(shape)
        refresh = sum((2 + 8 / 3) * side**3 for side in turned) / self.refresh_every_steps
        return sum(8.0 * math.prod(shape) * side for side in turned) + refresh

    def _turned(self, shape: Shape) -> list[int]:
        return [side for side in shape if side <= self.max_side] if len(shape) > 1 else []

    @staticmethod
    def step(group: Group, state: State) -> None:
        weights, gradients = with_gradients(group)
        if not weights:
            return
        for name in ("exp_avg", "exp_avg_sq"):
            kept(name, weights, state)
        adam_steps = advanced(weights, state) - 1
        for weight, gradient in zip(weights, gradients, strict=True):
            own = state[weight]
            if adam_steps == 0:
                _set_up(gradient, own, group)
                continue
            _update(weight, gradient, own, adam_steps, group)
            _average_products(gradient, own, group["betas"][1])
            if adam_steps % group["refresh_every_steps"] == 0:
                _refresh(own)


def _update(weight: Tensor, gradient: Tensor, own: dict[str, Tensor], adam_steps: int, group: Group) -> None:
    (beta1, beta2), mean, square = group["betas"], own["exp_avg"], own["exp_avg_sq"]
    corrected_steps = adam_steps + group.get("steps_ahead", 0)
    turned = _turn(gradient, own)
    mean.lerp_(gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(turned, turned, value=1.0 - beta2)
    denominator = (square / (1.0 - beta2**corrected_steps)).sqrt_().add_(group["eps"])
    update = _turn_back(_turn(mean, own) / (1.0 - beta1**corrected_steps) / denominator, own)
    weight.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _set_up(gradient: Tensor, own: dict[str, Tensor], group: Group) -> None:
    sides = zip(_SIDES, gradient.shape, strict=True) if gradient.ndim > 1 else ()
    for name, side in sides:
        if side <= group["max_side"]:
            own[f"{name}_product"] = gradient.new_zeros(side, side)
    _average_products(gradient, own, group["betas"][1])
    for name in _turned_sides(own):
        _, vectors = torch.linalg.eigh(_at_least_float32(own[f"{name}_product"]))
        own[f"{name}_vectors"] = vectors.flip(1).to(gradient.dtype)


def _average_products(gradient: Tensor, own: dict[str, Tensor], beta: float) -> None:
    for name in _turned_sides(own):
        product = gradient @ gradient.mT if name == "left" else gradient.mT @ gradient
        own[f"{name}_product"].lerp_(product, 1.0 - beta)


def _refresh(own: dict[str, Tensor]) -> None:
    square = own["exp_avg_sq"]
    for dimension, name in enumerate(_SIDES):
        if f"{name}_product" not in own:
            continue
        vectors = own[f"{name}_vectors"]
        multiplied = own[f"{name}_product"] @ vectors
        order = (vectors * multiplied).sum(dim=0).argsort(descending=True)
        square.copy_(square.index_select(dimension, order))
        orthogonal, _ = torch.linalg.qr(_at_least_float32(multiplied.index_select(1, order)))
        vectors.copy_(orthogonal)


def _turn(matrix: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Return Qᵀ_L·matrix·Q_R, without a side that is not turned."""
    matrix = own["left_vectors"].mT @ matrix if "left_vectors" in own else matrix
    return matrix @ own["right_vectors"] if "right_vectors" in own else matrix


def _turn_back(matrix: Tensor, own: dict[str, Tensor]) -> Tensor:
    matrix = own["left_vectors"] @ matrix if "left_vectors" in own else matrix
    return matrix @ own["right_vectors"].mT if "right_vectors" in own else matrix


def _turned_sides(own: dict[str, Tensor]) -> list[str]:
    return [name for name in _SIDES if f"{name}_product" in own]


def _at_least_float32(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
