"""Orthogonalise matrices by Newton–Schulz iteration: U Σ Vᵀ → about U Vᵀ.

Shapes: matrices (m, n), any m and n; the iteration runs on the shorter side.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Coefficients = tuple[tuple[float, float, float], ...]

#: (a, b, c) of X ← aX + (bA + cA²)X with A = XXᵀ, one triple an iteration, and the factor on the norm of the input.
#: Sources: `keller` KellerJordan/Muon; `quintic` timm; `polar_express` arXiv 2505.16932 with the safety factor of Dion.
COEFFICIENTS: dict[str, tuple[Coefficients, float]] = {
    "keller": (((3.4445, -4.7750, 2.0315),) * 5, 1.0),
    "quintic": (
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
    ),
    "polar_express": (
        (
            (8.15655, -22.48329, 15.87877),
            (4.04293, -2.80892, 0.50002),
            (3.89167, -2.77248, 0.50606),
            (3.28575, -2.36813, 0.46449),
            (2.34654, -1.70978, 0.42324),
        ),
        1.02,
    ),
}

#: Matrices of one shape are multiplied as a batch while their shorter side is below this; larger ones fill the device
#: alone. For the CPU measured (`python -m tests.benchmarks`); for CUDA a guess from published work (batching gains 1.2
#: to 5 times for widths up to 1024), at the price of one stack of copies.
BATCHED_BELOW = {"cpu": 192, "cuda": 4096}

#: The norm is not allowed below this, so that a zero matrix stays zero (as in torch.optim.Muon).
EPSILON = 1e-7


def batches(matrices: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group the matrices to be orthogonalised together: one shape, up to transposition, and small enough to gain by
    it.
    """
    grouped: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        shape = tuple(sorted(matrix.shape))
        small = shape[0] < BATCHED_BELOW.get(matrix.device.type, 0)
        grouped[shape if small else (*shape, number)].append(matrix)
    return list(grouped.values())


def orthogonalise(
    matrices: Sequence[Tensor], coefficients: str = "keller", dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Return the matrices of one batch with their singular values pushed towards one, in `dtype`; inputs are not
    changed.

    Source: KellerJordan/Muon; the form (norm clamped, not shifted, at ε) is torch.optim.Muon's, which this equals bit
    for bit.
    """
    wide = [_wide(matrix.to(dtype)) for matrix in matrices]
    results = [_iterate(wide[0], coefficients)] if len(wide) == 1 else _iterate(torch.stack(wide), coefficients)
    return [result.mT if _is_tall(matrix) else result for matrix, result in zip(matrices, results, strict=True)]


def _iterate(x: Tensor, coefficients: str) -> Tensor:
    """Run all iterations on (m, n) or a stack (K, m, n), m ≤ n."""
    triples, norm_factor = COEFFICIENTS[coefficients]
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    x = x / (_norm(x).clamp(min=EPSILON) * norm_factor)
    for a, b, c in triples:
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _norm(x: Tensor) -> Tensor:
    """Return the Frobenius norm of a matrix, or of each matrix of a stack by the same kernel, so that the bits
    agree.
    """
    return x.norm() if x.ndim == 2 else torch.stack([matrix.norm() for matrix in x]).view(-1, 1, 1)


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix
