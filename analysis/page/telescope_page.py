"""The page of a telescoping sweep: what came out, the surfaces, the tables; one file."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis.format import MISSING
from analysis.page.drawn import inline_svg

_CAPTION = (
    "Final loss over the hyperparameters, level by level. Circle: the best point. Star: the optimum of a quadratic "
    "through the points around it; at the last width, where x* − α/n puts it. Line: the optima of narrower levels."
)


def telescope_page(
    title: str, description: str, sentences: Sequence[str], svg: bytes, tables: Mapping[str, pl.DataFrame]
) -> bytes:
    """Return the page as HTML that needs no other file."""
    environment = Environment(
        loader=PackageLoader("analysis.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return (
        environment.get_template("widths.html.j2")
        .render(
            title=title,
            description=description,
            sentences=sentences,
            svg=inline_svg(svg, "telescope", "loss surfaces by level"),
            caption=_CAPTION,
            tables=tables,
            written=_written,
        )
        .encode()
    )


def _written(value: Any) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
