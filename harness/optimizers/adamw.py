"""AdamW, by PyTorch's fused kernel. Source: arXiv 1711.05101, algorithm 2."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@torch.no_grad()
def adamw_step(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    """Update the parameters of a group (`lr`, `betas`, `eps`, `weight_decay`)."""
    weights = [weight for weight in group["params"] if weight.grad is not None]
    if not weights:
        return
    moments = [_moments(weight, state[weight]) for weight in weights]
    adamw(
        weights,
        [weight.grad for weight in weights if weight.grad is not None],
        [m["exp_avg"] for m in moments],
        [m["exp_avg_sq"] for m in moments],
        [],
        [m["step"] for m in moments],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _moments(weight: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    return state
