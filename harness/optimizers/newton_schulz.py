"""Orthogonalise matrices by Newton–Schulz iteration: U Σ Vᵀ → about U Vᵀ.

Shapes: matrices (out, in), any sizes, m the smaller of the two and n the larger; the iteration runs on the wide form
(m, n).

Precision: the sums of each product are float32 on the devices that we know, and what is stored between products is
rounded to bfloat16 (8 bits), float16 (11) or float32. Nothing overflows float16: all norms are near one or below.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from harness.optimizers.torch_later import Tensor, torch

_T = TypeVar("_T")

Coefficients = tuple[tuple[float, float, float], ...]
CoefficientSet = Literal["keller", "quintic", "polar_express"]
Form = Literal["standard", "gram"]
Iterations = Annotated[int, Field(ge=1, le=12)]
Precision = Literal["bfloat16", "float16", "float32"]

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

#: As many as every set has coefficients for.
NEWTON_SCHULZ_ITERATIONS = 5

#: The Gram form is taken where n is at least this many times m: there its products are fewer.
GRAM_ASPECT = 1.5

#: The Gram form starts anew after so many iterations.
_RESTART_AFTER = 2

#: Matrices of one shape are multiplied as a batch while their shorter side is below this; larger ones fill the device
#: alone. For the CPU measured: a batch takes .94 to .99 of the time at a width of 256, with equal bits, 1.05 to 1.08
#: at 512. For CUDA a guess from published work (batching gains 1.2 to 5 times for widths up to 1024), at the price of
#: one stack of copies.
BATCHED_BELOW = {"cpu": 320, "cuda": 4096}

#: The products XXᵀ of a batch have at most so many numbers, where they are not to outgrow the caches: of four matrices
#: at a width of 256. Four squares take .89 of the time of sixteen there, four of 256 × 1024 .94 of that of twelve.
BATCH_GRAM_NUMBERS = {"cpu": 2**18}

#: The norm is not allowed below this, so that a zero matrix stays zero (as in torch.optim.Muon).
EPSILON = 1e-7


def newton_schulz_flops(shape: tuple[int, ...], form: Form, iterations: int = NEWTON_SCHULZ_ITERATIONS) -> float:
    """Return the FLOPs of all iterations on one matrix.

    Standard: 4m²n + 2m³ an iteration. Gram: 2m²n before and after each of its two parts, and products of m × m in
    them: four an iteration, but one in the first of a part.
    """
    m, n = sorted(shape)
    if not _takes_gram(shape, form):
        return iterations * (4.0 * m * m * n + 2.0 * m**3)
    return sum(4.0 * m * m * n + 2.0 * m**3 * (4 * len(part) - 3) for part in _gram_parts(range(iterations)))


def batches(matrices: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group the matrices to be orthogonalised together: one shape, up to transposition, small enough to gain by it, and
    not too many. Matrices of one shape are neighbours.
    """
    grouped: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        grouped[tuple(sorted(matrix.shape))].append(matrix)
    return [batch for group in grouped.values() for batch in _cut(sorted(group, key=_is_tall))]


def _cut(group: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut matrices of one shape into batches."""
    device, shorter = group[0].device.type, min(group[0].shape)
    at_once = len(group)
    if shorter >= BATCHED_BELOW.get(device, 0):
        at_once = 1
    elif device in BATCH_GRAM_NUMBERS:
        at_once = max(1, BATCH_GRAM_NUMBERS[device] // shorter**2)
    for start in range(0, len(group), at_once):
        yield group[start : start + at_once]


def orthogonalise(
    matrices: Iterable[Tensor],
    coefficients: str = "keller",
    dtype: Precision = "bfloat16",
    form: Form = "standard",
    iterations: int = NEWTON_SCHULZ_ITERATIONS,
) -> list[Tensor]:
    """Return the matrices of one batch with their singular values pushed towards one, in `dtype`: a stack (k, out, in)
    for each run of equal shapes. Inputs are not changed; what a generator yields is not kept in its own precision.
    Fewer `iterations` than coefficients take the first of these; more repeat the last.

    Source: KellerJordan/Muon; the standard form (norm clamped, not shifted, at ε) is torch.optim.Muon's, which it
    equals bit for bit.
    """
    cast = [matrix.to(getattr(torch, dtype)) for matrix in matrices]
    turned = [(is_tall, len(list(run))) for is_tall, run in groupby(cast, _is_tall)]
    of_set, norm_factor = COEFFICIENTS[coefficients]
    triples = (of_set + of_set[-1:] * (iterations - len(of_set)))[:iterations]
    iterate = _by_gram if _takes_gram(cast[0].shape, form) else _by_steps
    x = iterate(_normalised(cast, norm_factor), triples)
    parts = torch.split(x if x.ndim == 3 else x.unsqueeze(0), [count for _, count in turned])
    # a copy: to add what is turned to weights that are not takes four times as long as both together
    return [part.mT.contiguous() if is_tall else part for part, (is_tall, _) in zip(parts, turned, strict=True)]


def _normalised(matrices: list[Tensor], norm_factor: float) -> Tensor:
    """Return a matrix (m, n) or a stack (k, m, n) of all of them, each at Frobenius norm 1; empties the list, so that
    they can be freed.
    """
    wide = [matrix.mT if _is_tall(matrix) else matrix for matrix in matrices]
    matrices.clear()
    if len(wide) == 1:
        alone: Tensor = wide[0] / (wide[0].norm().clamp(min=EPSILON) * norm_factor)
        return alone
    # the norm of each matrix by the same kernel as that of one alone, so that the bits agree
    norms = torch.stack([matrix.norm() for matrix in wide]).view(-1, 1, 1)
    return torch.stack(wide).div_(norms.clamp_(min=EPSILON) * norm_factor)


def _by_steps(x: Tensor, triples: Coefficients) -> Tensor:
    """Run all iterations on (m, n) or a stack (k, m, n)."""
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for a, b, c in triples:
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor, triples: Coefficients) -> Tensor:
    """Run all iterations as two products with X (m, n) of factors (m, m), which follow from A = XXᵀ alone.

    With P = aI + bA + cA²: Q ← PQ, A ← PAP; all are polynomials of the first A, so they commute and are symmetric.
    A is computed anew in between: rounding gives it negative eigenvalues, which every PAP multiplies by a². Without
    that, singular values of 7 came out of bfloat16 where the standard form gives 1.2, and of 700 with `polar_express`;
    with it, 1.4 and 1.5 (float16: 1.22 and 1.16; float32: those of the standard form).
    """
    for part in _gram_parts(triples):
        x = _product_of_factors(x @ x.mT, part) @ x
    return x


def _gram_parts(iterations: Sequence[_T]) -> list[Sequence[_T]]:
    """Cut the iterations where A is computed anew: after the first two, in which small singular values grow most."""
    return [part for part in (iterations[:_RESTART_AFTER], iterations[_RESTART_AFTER:]) if part]


def _product_of_factors(gram: Tensor, triples: Sequence[tuple[float, float, float]]) -> Tensor:
    product = factor = _factor(gram, triples[0])
    for triple in triples[1:]:
        gram = factor @ gram @ factor
        factor = _factor(gram, triple)
        product = factor @ product
    return product


def _factor(gram: Tensor, triple: tuple[float, float, float]) -> Tensor:
    """Return aI + bA + cA² of a matrix A or a stack of them."""
    a, b, c = triple
    multiply_add = torch.addmm if gram.ndim == 2 else torch.baddbmm
    factor = multiply_add(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def _takes_gram(shape: Sequence[int], form: Form) -> bool:
    return form == "gram" and max(shape) >= GRAM_ASPECT * min(shape)


def _is_tall(matrix: Tensor) -> bool:
    return bool(matrix.shape[0] > matrix.shape[1])
