"""NorMuon: Muon whose update is divided, row by row, by a running root mean square.

v ← β2·v + (1−β2)·mean over a row of O²; Ô = O/(√v + ε); then Ô gets a length and is applied as Muon's.

Source: arXiv 2510.05491.
"""

import math
from typing import ClassVar, Literal

from harness.optimizers.orthogonal import OrthogonalOptimizer, as_float32, matrix_norms, orthogonal_step
from harness.optimizers.rates import DecayRate, Positive
from harness.optimizers.rule import Group, Shape, State
from harness.optimizers.torch_later import Tensor, torch


class NorMuonConfig(OrthogonalOptimizer):
    """NorMuon on the hidden matrices, AdamW on the rest. Source: arXiv 2510.05491.

    Two forms are about. The authors' code (the default): Nesterov momentum, `length: kept` (‖Ô‖_F = ‖O‖_F) and
    `scale: original`. The paper's algorithm: `nesterov: false, length: rms`, an update of root mean square 0.2,
    whatever `scale` says.
    """

    source: ClassVar[str] = "arXiv 2510.05491"

    name: Literal["normuon"] = "normuon"
    scale: Literal["match_rms_adamw", "original", "spectral"] = "original"
    beta2: DecayRate = 0.95
    length: Literal["kept", "rms"] = "kept"
    eps: Positive = 1e-10

    def state_numbers(self, shape: Shape) -> int:
        return math.prod(shape) + shape[0]

    @staticmethod
    def step(group: Group, state: State) -> None:
        orthogonal_step(group | _scale(group), state, finish=_divide_rows)


def _scale(group: Group) -> Group:
    return {"scale": "none"} if group["length"] == "rms" else {}


def _divide_rows(update: Tensor, weights: list[Tensor], state: State, group: Group) -> Tensor:
    update = as_float32(update)
    length = matrix_norms(update) if group["length"] == "kept" else 0.2 * math.sqrt(weights[0].numel())
    mean_squares = torch.linalg.vector_norm(update, dim=-1, keepdim=True).square_().div_(update.shape[-1])
    rows = [_rows(weight, state[weight]) for weight in weights]
    torch._foreach_lerp_(rows, mean_squares.to(rows[0].dtype).unbind(), 1.0 - group["beta2"])
    update.div_(torch.stack(rows).sqrt_().add_(group["eps"]))
    return update.mul_(length / matrix_norms(update).add_(group["eps"]))


def _rows(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "row_mean_square" not in state:
        state["row_mean_square"] = weight.new_zeros(weight.shape[0], 1)
    return state["row_mean_square"]
