"""The report's figures as files and as inline elements of its page."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.estimate import Estimates
from analysis.page import captions
from analysis.page.parts import Part, over_models, parts
from harness.record import write_atomically

#: Figures whose points come from several models.
_OVER_MODELS = ("laws",)


@dataclass(frozen=True)
class DrawnFigure:
    """A figure of one part as files and as an inline element; in `words` why it is absent, where it is.

    `told` says that the caption stands under an earlier figure of its kind.
    """

    name: str
    kind: str
    label: str
    caption: captions.Caption
    inline_svg: str
    words: str
    told: bool = False


def draw_all(estimates: Estimates, folder: Path) -> Iterator[DrawnFigure]:
    """Write every figure into `folder` as SVG and PNG, each whole or not at all, and yield it."""
    from analysis.page import plots  # seaborn takes seconds to import

    split = parts(estimates)
    for kind in plots.FIGURES:
        told = False
        for part in over_models(estimates) if kind in _OVER_MODELS else split:
            figure = replace(_draw(kind, part, folder), told=told)
            told = told or bool(figure.inline_svg)
            yield figure


def inline_svg(svg: bytes, prefix: str, label: str) -> str:
    """Return an SVG as an HTML element that scales, whose ids collide with no other's: each is prefixed."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)
    assert width is not None
    text = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}" style="max-width:{width[1]}pt"', 1)


def _draw(kind: str, part: Part, folder: Path) -> DrawnFigure:
    """Draw one figure of one part; files of an earlier report that has it no more are removed."""
    from analysis.page import figure_style, plots

    name, caption = "-".join(filter(None, (kind, _file_name(part.label)))), captions.FIGURES[kind]
    files = folder / f"{name}.svg", folder / f"{name}.png"
    drawing = plots.draw(kind, part.estimates, part.protocol)
    if isinstance(drawing, str):
        for file in files:
            file.unlink(missing_ok=True)
        return DrawnFigure(name, kind, part.label, caption, "", drawing)
    svg = figure_style.svg_bytes(drawing)
    for file, content in zip(files, (svg, figure_style.png_bytes(drawing)), strict=True):
        write_atomically(file, content)
    element = inline_svg(svg, name.replace(".", "_"), caption.title)
    return DrawnFigure(name, kind, part.label, caption, element, "")


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", label.replace("model ", "").replace("protocol ", "")).strip("-")
