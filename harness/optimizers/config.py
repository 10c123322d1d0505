"""What an optimizer is, as configuration; imports no torch.

A decay rate (momentum, a beta) is either a number per step or a half-life in tokens, so that a sweep
over batch sizes can hold either one fixed.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from harness.frozen import Frozen

UnitInterval = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class HalfLife(Frozen):
    """Decay by one half every `half_life_tokens`, never below `floor` per step.

    Source: arXiv 2507.07101, β(B') = β(B)^(B'/B). The floor is ours: the rule alone gives β2 = .31 at 16M tokens.
    """

    half_life_tokens: Positive
    floor: UnitInterval = 0.0


DecayRate = UnitInterval | HalfLife


def decay_per_step(rate: float | HalfLife, tokens_per_step: int) -> float:
    """Return the factor by which an average shrinks in one optimizer step."""
    if isinstance(rate, HalfLife):
        return max(rate.floor, math.exp2(-tokens_per_step / rate.half_life_tokens))
    return rate


class AdamWConfig(Frozen):
    """AdamW on every parameter. Source: arXiv 1711.05101."""

    name: Literal["adamw"] = "adamw"
    peak_lr: Positive
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1


class AuxiliaryConfig(Frozen):
    """AdamW for what Muon leaves out: embeddings, head, norms.

    `lr_multiplier` is relative to Muon's own rate; betas as in arXiv 2505.02222.
    """

    lr_multiplier: Positive = 1.0
    betas: tuple[DecayRate, DecayRate] = (0.95, 0.95)
    eps: Positive = 1e-8


#: Of every set of coefficients in `newton_schulz`.
NEWTON_SCHULZ_ITERATIONS = 5


class MuonConfig(Frozen):
    """Muon on the hidden matrices, AdamW on the rest. Sources: KellerJordan/Muon; arXiv 2502.16982; arXiv
    2505.02222.
    """

    name: Literal["muon"] = "muon"
    peak_lr: Positive
    momentum: DecayRate = 0.95
    nesterov: bool = True
    weight_decay: NonNegative = 0.1
    scale: Literal["match_rms_adamw", "original", "spectral"] = "match_rms_adamw"
    newton_schulz: Literal["keller", "quintic", "polar_express"] = "keller"
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="name")]
