"""OrScale: Muon with a trust ratio whose denominator is the direction that is really subtracted.

D = λW + s·O; r = ‖W‖_F/(c·‖D‖_F + 1e-6); W ← W − γ·clip(r)·D: the decay is inside.

Source: arXiv 2605.07815.
"""

from typing import ClassVar, Literal

from harness.optimizers.orthogonal import OrthogonalOptimizer, matrix_norms, orthogonal_step, step_scale
from harness.optimizers.rates import Positive
from harness.optimizers.rule import Group, Shape, State
from harness.optimizers.torch_later import Tensor, torch

_EPSILON = 1e-6


class OrScaleConfig(OrthogonalOptimizer):
    """OrScale on the hidden matrices, AdamW on the rest: one `coefficient` c for all. Source: arXiv 2605.07815.

    Assumption: c = 1, the scale and the bounds of the ratio are not given for this form in what could be read; the
    bounds are those of the form for language models.
    """

    source: ClassVar[str] = "arXiv 2605.07815"

    name: Literal["orscale"] = "orscale"
    scale: Literal["match_rms_adamw", "original", "spectral"] = "original"
    coefficient: Positive = 1.0
    ratio_bounds: tuple[Positive, Positive] = (0.1, 5.0)

    @staticmethod
    def step(group: Group, state: State) -> None:
        orthogonal_step(group, state, apply=_apply)


class OrScaleLMConfig(OrthogonalOptimizer):
    """OrScale-LM on the hidden matrices, AdamW on the rest: c is set on a matrix' first step, so that its ratio starts
    at one. Source: arXiv 2605.07815.
    """

    source: ClassVar[str] = "arXiv 2605.07815"

    name: Literal["orscale_lm"] = "orscale_lm"
    ratio_bounds: tuple[Positive, Positive] = (0.1, 5.0)

    def state_numbers(self, shape: Shape) -> int:
        return super().state_numbers(shape) + 1

    @staticmethod
    def step(group: Group, state: State) -> None:
        orthogonal_step(group, state, apply=_apply_calibrated)


def _apply(update: Tensor, weights: list[Tensor], state: State, group: Group) -> None:
    del state
    direction, weight_norms = _direction(update, weights, group)
    _subtract(direction, weight_norms / (group["coefficient"] * matrix_norms(direction) + _EPSILON), weights, group)


def _apply_calibrated(update: Tensor, weights: list[Tensor], state: State, group: Group) -> None:
    direction, weight_norms = _direction(update, weights, group)
    norms = matrix_norms(direction)
    if "calibration" not in state[weights[0]]:
        ratios = weight_norms / norms
        at_first = ratios.where((ratios > 0) & ratios.isfinite(), 1.0)
        for weight, calibration in zip(weights, at_first.unbind(), strict=True):
            state[weight]["calibration"] = calibration.clone()
    calibrations = torch.stack([state[weight]["calibration"] for weight in weights])
    _subtract(direction, weight_norms / (calibrations * norms + _EPSILON), weights, group)


def _direction(update: Tensor, weights: list[Tensor], group: Group) -> tuple[Tensor, Tensor]:
    """Return D and ‖W‖_F of a stack."""
    stack = torch.stack(weights)
    norms = matrix_norms(stack)
    stack.mul_(group["weight_decay"])
    torch._foreach_add_(stack.unbind(), update.unbind(), alpha=step_scale(weights[0].shape, group["scale"]))
    return stack, norms


def _subtract(direction: Tensor, ratios: Tensor, weights: list[Tensor], group: Group) -> None:
    low, high = group["ratio_bounds"]
    torch._foreach_sub_(weights, direction.mul_(ratios.clamp(low, high).mul_(group["lr"])).unbind())
