"""Sizes and singular values of matrices: the update of a step, the momentum behind it.

Singular values are square roots of the eigenvalues of the smaller Gram matrix in float64. They are divided by their
root mean square σ_rms = ‖X‖_F / √m, m = min(out, in): 1 throughout for an orthogonal matrix. Ranks are shares of m.

Stable rank: ‖X‖_F² / σ_max². Effective rank: the exponential of the entropy of σ / Σσ (Roy and Vetterli, EUSIPCO 2007).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from harness.callbacks.diagnostics.groups import Groups
from harness.callbacks.diagnostics.rows import Row, row_of

#: Percentiles of the singular values of a matrix; 0 and 100 are the least and the largest.
PERCENTILES = (0, 10, 25, 50, 75, 90, 100)

STATISTICS = (*(f"singular_value_p{percent}" for percent in PERCENTILES), "stable_rank", "effective_rank")


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of (out, in) in ascending order, (m,), float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return squares.clamp_min(0.0).sqrt()


def spectrum(values: Tensor) -> Tensor:
    """Return STATISTICS of the singular values of a matrix; NaN for a matrix of zeros."""
    relative = values / values.square().mean().sqrt()
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    at = torch.tensor(PERCENTILES, dtype=values.dtype, device=values.device) / 100
    ranks = torch.stack((1 / relative[-1].square(), entropy.exp() / len(values)))
    return torch.cat((torch.quantile(relative, at), ranks))


def spectrum_rows(of: str, statistics: Mapping[int, Tensor], groups: Groups) -> Iterator[Row]:
    """Yield the mean over the matrices of each group that has any; `statistics` are STATISTICS by the matrix' place."""
    for group, places in groups.items():
        own = [statistics[place] for place in places if place in statistics]
        if own and group != "all":
            for name, value in zip(STATISTICS, torch.stack(own).mean(dim=0).tolist(), strict=True):
                yield row_of(f"{of}_{name}", group, value)


def size_rows(update: Sequence[Tensor], groups: Groups) -> Iterator[Row]:
    """Yield `update_rms`, of all weights of a group together, and `update_spectral_norm`, of its largest matrix."""
    squares = [float(change.double().square().sum()) for change in update]
    largest = {place: float(singular_values(change)[-1]) for place, change in enumerate(update) if change.ndim > 1}
    for group, places in groups.items():
        numbers = sum(update[place].numel() for place in places)
        rms = math.sqrt(sum(squares[place] for place in places) / numbers)
        yield row_of("update_rms", group, rms)
        norms = [largest[place] for place in places if place in largest]
        if norms:
            yield row_of("update_spectral_norm", group, max(norms))
