"""How figures look and how they are saved: one theme, fixed colours and markers, byte-identical files.

Figures are built without pyplot, so they need no display and leave no global state behind.
"""

import io
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import matplotlib as mpl
import polars as pl
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis import format as fmt

INK = "#262626"
MUTED = "#6b6b6b"
PNG_DPI = 200

PANEL_WIDTH_INCHES, PANEL_HEIGHT_INCHES = 3.3, 2.6
LEGEND_WIDTH_INCHES = 1.5
NOTE_LINE_POINTS = 10.5
NOTE_CHARACTERS = 64
MAX_PANEL_COLUMNS = 3

#: Places in the colour-blind palette; other optimizers take the free places in alphabetical order.
_COLOUR_PLACES = {"adamw": 0, "muon": 1}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "<", ">", "p", "d", "8", "H")
#: The palette's yellow vanishes on white paper; these follow the others, so that 14 optimizers have one each.
_PALE, _MORE_COLOURS = 8, ("#4b2e83", "#00524d", "#7f7300", "#9b2226", "#3d5a80")
#: More optimizers than these in a panel hide each other's bands and critical batches.
_MAX_TOGETHER = 5
_CROWDED_HEIGHT = 1.5
_LINE_STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (3, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)))


@contextmanager
def theme() -> Iterator[None]:
    """Draw and save inside this context: the theme of every figure, put back afterwards."""
    with mpl.rc_context():
        seaborn.set_theme(context="paper", style="ticks", palette="colorblind")
        mpl.rcParams.update(
            {
                "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
                "svg.fonttype": "path",
                "svg.hashsalt": "critbatch",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "legend.frameon": False,
                "lines.linewidth": 1.3,
                "lines.markersize": 5.0,
            }
        )
        yield


def svg_bytes(figure: Figure) -> bytes:
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def png_bytes(figure: Figure) -> bytes:
    return _saved(figure, "png", {"Software": None})


def mapping(frame: pl.DataFrame) -> dict[str, list[Any]]:
    """Return the columns as plain lists: seaborn 0.13 refuses polars 2 frames."""
    return frame.to_dict(as_series=False)


class OptimizerStyle:
    """A colour, a marker and a line style for each optimizer, the same in every figure of a report."""

    def __init__(self, optimizers: Sequence[str]) -> None:
        self.names = sorted(optimizers, key=lambda name: (_COLOUR_PLACES.get(name, len(_COLOUR_PLACES)), name))
        free = (place for place in count() if place not in _COLOUR_PLACES.values())
        self._places = {name: _COLOUR_PLACES[name] if name in _COLOUR_PLACES else next(free) for name in self.names}
        named = seaborn.color_palette("colorblind")
        self._palette = [*named[:_PALE], *named[_PALE + 1 :], *_MORE_COLOURS]

    @property
    def is_crowded(self) -> bool:
        """Whether there are too many to draw bands and critical batches of all in one panel."""
        return len(self.names) > _MAX_TOGETHER

    @property
    def panel_height_inches(self) -> float:
        """The height of a panel that has them all."""
        return PANEL_HEIGHT_INCHES * (_CROWDED_HEIGHT if self.is_crowded else 1.0)

    def colour(self, name: str) -> Any:
        return self._palette[self._places[name] % len(self._palette)]

    def marker(self, name: str) -> str:
        return _MARKERS[self._places[name] % len(_MARKERS)]

    def line_style(self, name: str) -> Any:
        return _LINE_STYLES[self._places[name] % len(_LINE_STYLES)]

    def dodge(self, name: str) -> float:
        """Return a factor near 1 that moves the optimizers' points apart on a log axis of batch sizes."""
        return dodge(self.names.index(name), len(self.names), octaves=0.05)

    def handles(self, drawn: Collection[str]) -> list[Line2D]:
        """Return the legend's entries, one for each optimizer of which something is drawn."""
        return [
            Line2D(
                [],
                [],
                color=self.colour(name),
                marker=self.marker(name),
                ls=self.line_style(name),
                label=fmt.optimizer_name(name),
            )
            for name in self.names
            if name in drawn
        ]


def dodge(place: int, places: int, octaves: float) -> float:
    """Return the factor on a batch size that puts `places` marks side by side, `octaves` apart."""
    return float(2.0 ** (octaves * (place - (places - 1) / 2)))


class OrderedStyle:
    """A viridis colour and a marker for each of some ordered values: batch sizes, target losses."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)
        last = max(len(self.values) - 1, 1)
        # without the last eighth of the scale: its yellow vanishes on white paper
        self.palette = {value: mpl.colormaps["viridis"](0.88 * place / last) for place, value in enumerate(self.values)}
        self.markers = {value: _MARKERS[place % len(_MARKERS)] for place, value in enumerate(self.values)}

    def handles(self, write: Callable[[Any], str], drawn: Collection[Any]) -> list[Line2D]:
        """Return the legend's entries, one for each value of which something is drawn."""
        return [
            Line2D([], [], color=self.palette[value], marker=self.markers[value], label=write(value))
            for value in self.values
            if value in drawn
        ]


def panels(
    number: int,
    *,
    share: bool = True,
    note_lines: int = 0,
    height_inches: float = PANEL_HEIGHT_INCHES,
    margin_inches: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `number` panels in rows of three, with room for notes above and a legend at the right.

    `share` gives all panels the same axes; the ticks of y are then labelled once a row. `margin_inches` is the room
    for long labels at the left.
    """
    figure, columns, rows = _sheet(number, height_inches + note_lines * NOTE_LINE_POINTS / 72, margin_inches)
    axes = list(figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).flat)
    for spare in axes[number:]:
        spare.remove()
    for ax in axes[:number]:
        ax.tick_params(labelbottom=True)
    return figure, axes[:number]


def panels_with_strips(number: int) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Return a figure of `number` panels that share their y axes, each over a lower strip that shares its x axis."""
    figure, columns, rows = _sheet(number, 1.6 * PANEL_HEIGHT_INCHES)
    grid, pairs = figure.add_gridspec(2 * rows, columns, height_ratios=(2.4, 1) * rows), list[tuple[Axes, Axes]]()
    for place in range(number):
        row, column = 2 * (place // columns), place % columns
        beside = pairs[0] if pairs else (None, None)
        upper = figure.add_subplot(grid[row, column], sharey=beside[0])
        lower = figure.add_subplot(grid[row + 1, column], sharex=upper, sharey=beside[1])
        upper.tick_params(labelbottom=False, labelleft=column == 0)
        lower.tick_params(labelleft=column == 0)
        pairs.append((upper, lower))
    return figure, pairs


def y_label(axes: Sequence[Axes], text: str) -> None:
    """Label the y axis that panels share once a row."""
    for ax in axes[::MAX_PANEL_COLUMNS]:
        ax.set_ylabel(text)


def empty_panel(ax: Axes, message: str) -> None:
    """Say in the panel itself why it is empty."""
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color=MUTED, wrap=True)


def heading(ax: Axes, title: str, notes: Sequence[str] = (), lines: int | None = None) -> None:
    """Write a panel's title and one note a line under it; `lines` keeps it level with a panel of more notes."""
    notes = wrapped(notes)
    lines = len(notes) if lines is None else lines
    for place, text in enumerate(notes):
        above = 3 + NOTE_LINE_POINTS * (lines - 1 - place)
        ax.annotate(
            text,
            (0, 1),
            (0, above),
            xycoords="axes fraction",
            textcoords="offset points",
            color=INK,
            fontsize="x-small",
            va="bottom",
        )
    ax.set_title(title, loc="left", pad=5 + NOTE_LINE_POINTS * lines, fontweight="bold", fontsize="small")


def wrapped(notes: Sequence[str]) -> list[str]:
    """Break notes into lines that a panel has room for."""
    return [line for note in notes for line in textwrap.wrap(note, NOTE_CHARACTERS, subsequent_indent="    ")]


def batch_axis(ax: Axes, batches: Sequence[int]) -> None:
    """Set up the log2 axis of global batch sizes: a tick at each that was run, labels where they have room."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(batches) / 1.6, max(batches) * 1.6)
    ax.xaxis.set_major_locator(FixedLocator(list(batches)))
    ax.xaxis.set_major_formatter(FixedFormatter(_spaced_labels(batches)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("Global batch size (tokens)")


def log_axis(
    ax: Axes,
    which: Literal["x", "y"],
    write: Callable[[float], str] = fmt.tick,
    headroom: float = 0.0,
    footroom: float = 0.0,
) -> None:
    """Set up a log axis with ticks at 1, 2 and 5, over at least a factor of five.

    `headroom` and `footroom` are added to its ends, as shares of its length.

    Axes that are shared are set up once, through any of their panels. An axis without data loses its ticks.
    """
    ax.set(**{f"{which}scale": "log"})
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    if not 0 < low < high:
        ax.set(**{f"{which}scale": "linear", f"{which}ticks": []})
        return
    widen = max(1.0, (5.0 / (high / low)) ** 0.5)
    low, high = low / widen, high * widen
    ax.set(**{f"{which}lim": (low * (low / high) ** footroom, high * (high / low) ** headroom)})
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / low < 300 else (1,), numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_formatter(NullFormatter())


def side_legend(figure: Figure, handles: Sequence[Any], title: str | None = None) -> None:
    """Put the legend to the right of every panel, where it can cover nothing."""
    legend = figure.legend(
        handles=list(handles), title=title, loc="outside right upper", fontsize="small", title_fontsize="small"
    )
    legend.set_alignment("left")


def without_lines(handles: Sequence[Line2D]) -> list[Line2D]:
    """Leave the markers of a legend's entries alone, for points that no line joins."""
    for handle in handles:
        handle.set_linestyle("")
    return list(handles)


def legend_heading(text: str) -> Line2D:
    """Return a legend entry that is a heading over those that follow it."""
    return Line2D([], [], ls="", label=rf"$\bf{{{text}}}$")


def cue(label: str, **style: Any) -> Line2D:
    """Return a legend entry in ink that explains a marker or a line."""
    return Line2D([], [], label=label, **({"color": INK, "ls": ""} | style))


def _sheet(number: int, height_inches: float, margin_inches: float = 0.0) -> tuple[Figure, int, int]:
    columns = min(number, MAX_PANEL_COLUMNS)
    rows = -(-number // columns)
    size = (margin_inches + columns * PANEL_WIDTH_INCHES + LEGEND_WIDTH_INCHES, rows * height_inches + 0.5)
    return Figure(figsize=size, layout="constrained"), columns, rows


def _spaced_labels(batches: Sequence[int]) -> list[str]:
    """Label each batch, leaving out those nearer than a seventh of the axis to the last one labelled."""
    nearest_ratio = (max(batches) / min(batches)) ** (1 / 7)
    labels, last = [], 0.0
    for size in batches:
        room = size >= last * nearest_ratio
        labels.append(fmt.tokens(size) if room else "")
        last = size if room else last
    return labels


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    with theme():
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()
