"""Muon: momentum, orthogonalised by Newton–Schulz, for the hidden matrices; `orthogonal` has the rule."""

from typing import ClassVar, Literal

from harness.optimizers.orthogonal import OrthogonalOptimizer, orthogonal_step
from harness.optimizers.rule import Group, State


class MuonConfig(OrthogonalOptimizer):
    """Muon on the hidden matrices, AdamW on the rest. Sources: KellerJordan/Muon; arXiv 2502.16982; arXiv
    2505.02222.
    """

    source: ClassVar[str] = "KellerJordan/Muon; arXiv 2502.16982; arXiv 2505.02222"

    name: Literal["muon"] = "muon"

    @staticmethod
    def step(group: Group, state: State) -> None:
        orthogonal_step(group, state)
