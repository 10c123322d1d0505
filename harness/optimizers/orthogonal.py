"""What all optimizers of Muon's family share: momentum, orthogonalised by Newton–Schulz, scaled, applied with decay.

M ← μM + (1−μ)G; U = (1−μ)G + μM (Nesterov) or M; O = NS(U); W ← (1 − γλ)W − γ·s·O, with W (out, in).
A member of the family replaces one of these: the gradients that go in, O, or the last assignment.

Sources: KellerJordan/Muon (algorithm); torch.optim.Muon (the exponential-average form, equal to it bit for bit); arXiv
2502.16982, eq. 4 (weight decay) and section 2.2 (`match_rms_adamw`).
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Literal

from harness.frozen import ADDED_LATER
from harness.optimizers.adamw import AuxiliaryConfig
from harness.optimizers.newton_schulz import (
    NEWTON_SCHULZ_ITERATIONS,
    CoefficientSet,
    Form,
    Iterations,
    Precision,
    batches,
    newton_schulz_flops,
    orthogonalise,
)
from harness.optimizers.rates import DecayRate
from harness.optimizers.rule import (
    Assignment,
    Group,
    Optimizer,
    Role,
    Shape,
    State,
    gradients,
    kept,
    with_gradients,
)
from harness.optimizers.torch_later import Tensor, torch

Scale = Literal["match_rms_adamw", "original", "spectral", "none"]

#: Returns what goes in for the gradients of these parameters, in memory of its own.
Pushed = Callable[[list[Tensor], State, Group], list[Tensor]]
#: Gets a stack (k, out, in) of updates, its parameters, their state and group.
Finish = Callable[[Tensor, list[Tensor], State, Group], Tensor]
Apply = Callable[[Tensor, list[Tensor], State, Group], None]


class OrthogonalOptimizer(Optimizer):
    """Settings of the family; the hidden matrices go by its rule, all other parameters by AdamW (`auxiliary`).

    `newton_schulz_form: gram` multiplies less on matrices at least 1.5 times as long as wide, and rounds differently:
    off by default.
    """

    momentum: DecayRate = 0.95
    nesterov: bool = True
    scale: Literal["match_rms_adamw", "original", "spectral"] = "match_rms_adamw"
    newton_schulz: CoefficientSet = "keller"
    newton_schulz_dtype: Precision = "bfloat16"
    newton_schulz_form: Annotated[Form, ADDED_LATER] = "standard"
    newton_schulz_iterations: Annotated[Iterations, ADDED_LATER] = NEWTON_SCHULZ_ITERATIONS
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()

    def assign(self, role: Role, shape: Shape) -> Assignment:
        if role == "hidden":
            return super().assign(role, shape)
        return Assignment(self.auxiliary, self.auxiliary.lr_multiplier, self.decay_of(shape))

    def state_numbers(self, shape: Shape) -> int:
        return math.prod(shape)

    def flops(self, shape: Shape) -> float:
        return newton_schulz_flops(shape, self.newton_schulz_form, self.newton_schulz_iterations)


def orthogonal_step(
    group: Group,
    state: State,
    pushed: Pushed | None = None,
    finish: Finish | None = None,
    apply: Apply | None = None,
) -> None:
    """Take one step of the family, with whatever a member replaces.

    Beside parameters and state it takes at most twice a batch of float32 (more with float32 iterations).
    """
    weights, _ = with_gradients(group)
    for batch in batches(weights):
        _step(batch, group, state, pushed, finish, apply or apply_with_decay)


def _step(
    batch: list[Tensor], group: Group, state: State, pushed: Pushed | None, finish: Finish | None, apply: Apply
) -> None:
    updates = orthogonalise(
        _released(_directions(batch, state, group, pushed)),
        group["newton_schulz"],
        group["newton_schulz_dtype"],
        group["newton_schulz_form"],
        group["newton_schulz_iterations"],
    )
    members = iter(batch)
    for update in _released(updates):
        own = list(islice(members, len(update)))
        apply(finish(update, own, state, group) if finish else update, own, state, group)


def _directions(batch: list[Tensor], state: State, group: Group, pushed: Pushed | None) -> list[Tensor]:
    """Advance the momenta; return them, or a look ahead of them."""
    momenta = kept("momentum", batch, state)
    inputs = pushed(batch, state, group) if pushed else gradients(batch)
    torch._foreach_lerp_(momenta, inputs, 1.0 - group["momentum"])
    if not group["nesterov"]:
        return momenta
    if pushed:
        torch._foreach_lerp_(inputs, momenta, group["momentum"])
        return inputs
    return [*torch._foreach_lerp(inputs, momenta, group["momentum"])]


def _released(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield each tensor of a list and let go of it."""
    tensors.reverse()
    while tensors:
        yield tensors.pop()


def apply_with_decay(update: Tensor, weights: list[Tensor], state: State, group: Group) -> None:
    """W ← (1 − γλ)W − γ·s·update: the decay does not see the scale."""
    del state
    torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(weights, update.unbind(), alpha=-group["lr"] * step_scale(weights[0].shape, group["scale"]))


def step_scale(shape: Shape, scale: Scale) -> float:
    """Return s, by which an orthogonal update of this (out, in) matrix is multiplied.

    `original` √max(1, out/in) (KellerJordan/Muon); `match_rms_adamw` 0.2·√max(out, in) (arXiv 2502.16982, eq. 4);
    `spectral` √(out/in) (arXiv 2502.07529).
    """
    out_width, in_width = shape
    match scale:
        case "original":
            return math.sqrt(max(1.0, out_width / in_width))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(out_width, in_width))
        case "spectral":
            return math.sqrt(out_width / in_width)
        case "none":
            return 1.0


def as_float32(update: Tensor) -> Tensor:
    """Return a copy to work on."""
    return update.to(torch.float32, copy=True)


def matrix_norms(stack: Tensor) -> Tensor:
    """Return the Frobenius norms of a stack, shaped to divide it."""
    norms: Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    return norms
