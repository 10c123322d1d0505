"""Muon: momentum, orthogonalised by Newton–Schulz, for the hidden matrices.

M ← μM + (1−μ)G; U = (1−μ)G + μM (Nesterov) or M; W ← (1 − γλ)W − γ·s·NS(U), with W (out, in).

Sources: KellerJordan/Muon (algorithm); torch.optim.Muon (the exponential-average form, equal to it bit for bit); arXiv
2502.16982, eq. 4 (weight decay) and section 2.2 (`match_rms_adamw`).
"""

import math
from typing import Any

import torch
from torch import Tensor

from harness.optimizers.newton_schulz import batches, orthogonalise


@torch.no_grad()
def muon_step(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    """Update the parameters of a group (`lr`, `momentum`, `nesterov`, `weight_decay`, `scale`, `newton_schulz`,
    `newton_schulz_dtype`).

    Gradients are read, never written.
    """
    for weights in batches(weight for weight in group["params"] if weight.grad is not None):
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        momenta = [_momentum(weight, state[weight]) for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalise(directions, group["newton_schulz"], getattr(torch, group["newton_schulz_dtype"]))
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * step_scale(weight, group["scale"]))


def step_scale(weight: Tensor, scale: str) -> float:
    """Return s, by which an orthogonal update of this (out, in) matrix is multiplied.

    `original` √max(1, out/in) (KellerJordan/Muon); `match_rms_adamw` 0.2·√max(out, in) (arXiv 2502.16982, eq. 4);
    `spectral` √(out/in) (arXiv 2502.07529).
    """
    out_width, in_width = weight.shape
    if scale == "original":
        return math.sqrt(max(1.0, out_width / in_width))
    if scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out_width, in_width))
    assert scale == "spectral", scale
    return math.sqrt(out_width / in_width)


def _momentum(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(weight)
    return state["momentum"]
