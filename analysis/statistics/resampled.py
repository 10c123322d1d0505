"""One curve T(B) fitted to every resample of a bootstrap at once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.statistics.families import KINK, Array, Family
from analysis.statistics.least_squares import FROM_NEARBY, NUM_TRIES, ROUGH, TOLERANCE, least_squares
from analysis.statistics.noise import Errors
from analysis.statistics.residuals import ROBUST_SCALE, Observed

#: Starts: knees at this many places over the batches, and beyond by this much, each with these bends.
_KNEES = 9
_BEYOND = 2.0
_BENDS = 5


def fit_resamples(
    family: Family,
    global_batch_tokens: Sequence[float] | Array,
    log_tokens: Array,
    errors: Errors | None = None,
    residuals: str = "log",
    loss: str = "squares",
    prior: float = 1.0,
    near: tuple[float, float] | None = None,
) -> Array:
    """Return log T_min, log B_crit and bend [resamples, 3] fitted to log T [resamples, n]; deterministic.

    B_crit and the bend stay within the limits of the exhaustive search: at a limit they are not identified. `errors`
    weigh the points, and `prior` is the variance that an assumed spread of the bend is measured in. Resamples of points
    whose own fit is `near` (log B_crit, bend) start there, unless the family has minima between the batches.
    """
    log_batch = np.log(np.asarray(global_batch_tokens, float))
    observed = Observed(log_batch, log_tokens, errors, residuals, loss)
    limits = family.limits(log_batch)
    shapes = _places(family, log_batch, limits) if near is None or family is KINK else _around(near, limits)
    tries = NUM_TRIES if family is KINK else 1  # a kink has a minimum between each two batches
    found = descend(family, observed, shapes, prior, tries, ROUGH)
    return np.column_stack([found[:, 0], np.clip(found[:, 1:], limits[:, 0], limits[:, 1])])


def _places(family: Family, log_batch: Array, limits: Array) -> Array:
    """Return starts all over the batches."""
    ends = (log_batch.min() - _BEYOND, log_batch.max() + _BEYOND)
    bends = np.linspace(*family.bends, _BENDS + 2)[1:-1] if family.is_bent else limits[1][:1]
    return np.stack(np.meshgrid(np.linspace(*ends, _KNEES), bends, indexing="ij"), axis=-1).reshape(-1, 2)


def _around(near: tuple[float, float], limits: Array) -> Array:
    """Return starts at and about one knee."""
    knees = np.clip(near[0] + np.array([0.0, -1.0, 1.0]), *limits[0])
    return np.column_stack([knees, np.full(3, near[1])])


def descend(
    family: Family, observed: Observed, shapes: Array, prior: float, num_tries: int, tolerance: float = TOLERANCE
) -> Array:
    """Return log T_min, log B_crit and bend [resamples, 3] by least squares for log T [resamples, n], or for one.

    It starts from `shapes` (log B_crit, bend) [starts, 2], each at the mean height of every resample.
    """
    curve = _Curve(family, replace(observed, log_tokens=np.atleast_2d(observed.log_tokens)), prior)
    starts = curve.starts(shapes)
    task = (curve.model, curve.jacobian, curve.observations, starts, curve.whitening, observed.loss)
    solution = least_squares(*task, num_tries, tolerance, FROM_NEARBY)
    bend = np.full((len(solution.parameters), 1), family.bends[0])
    return np.column_stack([solution.parameters, *([] if family.is_bent else [bend])])


class _Curve:
    """Model, Jacobian and observations of the least squares; parameters log T_min, log B_crit and, if free, the bend.

    An assumed spread of the bend is one more point, of which 0 was observed.
    """

    def __init__(self, family: Family, observed: Observed, prior: float) -> None:
        self.family, self.observed = family, observed
        self.is_raw = observed.residuals != "log"
        self.shift = observed.log_batch if observed.residuals == "raw_steps" else np.zeros_like(observed.log_batch)
        self.pull = np.sqrt(prior) / family.spread if family.spread else 0.0
        sizes = observed.log_tokens - self.shift
        self.unit = float(np.sqrt(np.mean(np.exp(2 * sizes)))) if self.is_raw else 1.0
        own = np.exp(sizes) / self.unit if self.is_raw else sizes
        self.observations = np.column_stack([own, np.zeros(len(own))]) if self.pull else own
        root = observed.root if observed.loss == "squares" else np.eye(len(self.shift)) / ROBUST_SCALE
        self.whitening = np.block([[root, np.zeros((len(root), 1))], [np.zeros(len(root)), 1.0]]) if self.pull else root

    def starts(self, shapes: Array) -> Array:
        """Return starts [starts, resamples, p]."""
        excess = self.family.log_excess(self.observed.log_batch, shapes[:, :1], shapes[:, 1:])
        heights = self.observed.log_tokens.mean(axis=1) - excess.mean(axis=1)[:, None]
        shared = np.broadcast_to(shapes[:, None, :], (*heights.shape, 2))
        return np.concatenate([heights[:, :, None], shared], axis=-1)[:, :, : 3 if self.family.is_bent else 2]

    def model(self, parameters: Array) -> Array:
        log_size = self._log_size(parameters)
        own = np.exp(log_size) / self.unit if self.is_raw else log_size
        return np.column_stack([own, self.pull * parameters[:, 2]]) if self.pull else own

    def jacobian(self, parameters: Array) -> Array:
        by_knee, by_bend = self.family.slopes(self.observed.log_batch, *self._shape(parameters))
        columns = [np.ones_like(by_knee), by_knee, by_bend][: parameters.shape[1]]
        own = np.stack(columns, axis=-1)
        if self.is_raw:
            own *= np.exp(self._log_size(parameters))[:, :, None] / self.unit
        if not self.pull:
            return own
        pulled = np.broadcast_to([0.0, 0.0, self.pull], (len(own), 1, 3))
        return np.concatenate([own, pulled], axis=1)

    def _log_size(self, parameters: Array) -> Array:
        excess = self.family.log_excess(self.observed.log_batch, *self._shape(parameters))
        return np.asarray(parameters[:, :1] + excess - self.shift)

    def _shape(self, parameters: Array) -> tuple[Array, Array]:
        return parameters[:, 1:2], parameters[:, 2:3] if self.family.is_bent else np.zeros((1, 1))
