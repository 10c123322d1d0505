"""Slopes of log size against log width: a coordinate check's answer."""

import numpy as np
import polars as pl

from analysis.statistics.slopes import common_slope

SIZES = ("activation_rms", "change_rms", "update_rms")
_SERIES = ("optimizer", "parametrization")


def width_slopes(sizes: pl.DataFrame, level: float = 0.9) -> pl.DataFrame:
    """Return a row per optimizer, parametrization, role and size, and per layer: slope, slope_low, slope_high.

    `sizes` has a row per layer of every run: optimizer, parametrization, width, seed, layer, role and the SIZES. The
    layers of a role share a slope in the rows whose layer is null. A size of zero has no logarithm and is left out.
    """
    rows = []
    for keys in ((*_SERIES, "role"), (*_SERIES, "role", "layer")):
        for key, own in sizes.group_by(keys, maintain_order=True):
            rows += [dict(zip(keys, key, strict=True)) | _slope(own, size, level) for size in SIZES]
    schema = dict.fromkeys((*_SERIES, "role", "layer", "size"), pl.String)
    return pl.DataFrame(rows, schema=schema | dict.fromkeys(("slope", "slope_low", "slope_high"), pl.Float64))


def _slope(sizes: pl.DataFrame, size: str, level: float) -> dict[str, str | float | None]:
    own = sizes.filter(pl.col(size) > 0)
    _, group = np.unique(own["layer"].to_numpy(), return_inverse=True)
    if own.is_empty():
        return {"size": size, "slope": None, "slope_low": None, "slope_high": None}
    found = common_slope(own["width"].log().to_numpy(), own[size].log().to_numpy(), group, level)
    return {"size": size, "slope": found.value, "slope_low": found.low, "slope_high": found.high}
