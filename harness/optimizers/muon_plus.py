"""Muon+: Muon whose orthogonalised update has its rows and columns normalised once more.

O ← O with columns, rows, or both in turn divided by their L2 norm; then Muon's step, with s = √(out/in).

Source: arXiv 2602.21545.
"""

from typing import ClassVar, Literal

from harness.optimizers.orthogonal import OrthogonalOptimizer, as_float32, matrix_norms, orthogonal_step
from harness.optimizers.rule import Group, State
from harness.optimizers.torch_later import Tensor, torch

#: The dimension of (out, in) that a norm is taken over.
_DIMENSIONS = {"col": (-2,), "row": (-1,), "col_row": (-2, -1), "row_col": (-1, -2)}
_EPSILON = 1e-7


class MuonPlusConfig(OrthogonalOptimizer):
    """Muon+ on the hidden matrices, AdamW on the rest. Source: arXiv 2602.21545.

    Normalising changes the length of the update too (it doubles that of one of the MLP's two matrices at four times
    the width); `renorm` restores ‖O‖_F = √min(out, in), so that the direction alone differs from Muon's.
    Assumption: `col_row` is the default here; the source compares all four.
    """

    source: ClassVar[str] = "arXiv 2602.21545"

    name: Literal["muon_plus"] = "muon_plus"
    scale: Literal["match_rms_adamw", "original", "spectral"] = "spectral"
    norm: Literal["col", "row", "col_row", "row_col"] = "col_row"
    renorm: bool = False

    @staticmethod
    def step(group: Group, state: State) -> None:
        orthogonal_step(group, state, finish=_normalise)


def _normalise(update: Tensor, weights: list[Tensor], state: State, group: Group) -> Tensor:
    del weights, state
    update = as_float32(update)
    for dimension in _DIMENSIONS[group["norm"]]:
        update.div_(torch.linalg.vector_norm(update, dim=dimension, keepdim=True).clamp_(min=_EPSILON))
    if group["renorm"]:
        update.mul_(min(update.shape[-2:]) ** 0.5 / matrix_norms(update).clamp_(min=_EPSILON))
    return update
