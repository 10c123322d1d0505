"""Figures of time against compute: a panel a target and kind of device, which never share one.

Measured points are filled, projected ones open, a line joins each frontier. Time and cost of a point are proportional
to its T: so its interval is drawn along the diagonal on which it may lie.
"""

from typing import Any

import polars as pl
from matplotlib.axes import Axes

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import contents
from analysis.page import figure_style as style
from analysis.page.contents import Drawing
from analysis.page.figure_style import OptimizerStyle
from analysis.page.free_labels import FreeLabels
from analysis.quantities.frontier import MARKS
from analysis.statistics.pareto import undominated

COST_LABELS = {"device_seconds": "Device-seconds to target", "train_flops": "Training FLOPs to target"}
_OFF_FRONTIER: dict[str, Any] = {"mfc": "white", "ms": 2.5, "mew": 0.6, "alpha": 0.4}
_TIMES = ("train_seconds_low", "train_seconds", "train_seconds_high")
_INTERVAL: dict[str, Any] = {"lw": 1.0, "alpha": 0.45, "ls": "-", "zorder": 2}


def device_seconds(estimates: Estimates) -> Drawing:
    """Draw device-seconds against time to target over device counts, a line per frontier."""
    return _figure(estimates, "device_seconds")


def flops(estimates: Estimates) -> Drawing:
    """Draw training FLOPs against time to target over device counts, a line per frontier."""
    return _figure(estimates, "train_flops")


def devices(estimates: Estimates) -> Drawing:
    """Draw devices against time to target, a line per optimizer: at each device count its fastest batch."""
    return _figure(estimates, None)


def points_at(estimates: Estimates, target: float) -> pl.DataFrame:
    """Return the points of a target whose time and cost are known, on the device that most of the runs had."""
    points = estimates.frontier.filter(pl.col("target_loss_nats") == target).drop_nulls(
        ["train_seconds", "device_seconds"]
    )
    runs = estimates.records.runs["device"].value_counts(sort=True)["device"].to_list()
    here = [device for device in [*runs, *contents.values(points, "device")] if device in set(points["device"])]
    return points.filter(pl.col("device") == here[0]) if here else points


def fastest_batches(points: pl.DataFrame) -> pl.DataFrame:
    """Return, for each optimizer, kind and device count, the fastest batch; none that fewer devices match."""
    fastest = points.sort("train_seconds").unique(
        ["optimizer", "kind", "num_devices"], keep="first", maintain_order=True
    )
    kept = pl.struct(pl.col("num_devices").cast(pl.Float64), "train_seconds").map_batches(
        lambda pairs: pl.Series(undominated(*(pairs.struct.field(name).to_numpy() for name in pairs.struct.fields))),
        pl.Boolean,
    )
    return fastest.filter(kept.over("optimizer", "kind")).sort("optimizer", "kind", "num_devices")


def draw(ax: Axes, points: pl.DataFrame, cost: str, optimizers: OptimizerStyle) -> None:
    """Draw the points of one target and device, and a line along each optimizer's projected frontier."""
    ax.set_xlabel("Time to target (s)")
    points = points.drop_nulls(cost)
    if points.is_empty():
        style.empty_panel(ax, "no run reached this target")
        return
    for name in optimizers.names:
        own = points.filter(pl.col("optimizer") == name).sort("train_seconds", cost)
        measured, projected = (own.filter(pl.col("kind") == kind) for kind in ("measured", "projected"))
        look = {"ls": "", "marker": optimizers.marker(name), "color": optimizers.colour(name)}
        off, edge = projected.filter(~pl.col(MARKS[cost])), projected.filter(MARKS[cost])
        ax.plot(off["train_seconds"], off[cost], **(look | _OFF_FRONTIER), zorder=1.5)
        ax.plot(
            edge["train_seconds"], edge[cost], mfc="white", zorder=3, **(look | {"ls": optimizers.line_style(name)})
        )
        ax.plot(measured["train_seconds"], measured[cost], zorder=4, **look)
        _intervals(ax, pl.concat([edge, measured]), cost, optimizers.colour(name))


def set_axes(ax: Axes, cost: str, label_room: float = 0.0) -> None:
    """Set up the log axes, once for panels that share them; `label_room` is a share of their length."""
    write = "{:g}".format if cost == "device_seconds" else fmt.tick_flops
    style.log_axis(ax, "x", "{:g}".format, footroom=label_room)
    style.log_axis(ax, "y", write, headroom=label_room / 4, footroom=label_room / 2)


def name_ends(ax: Axes, points: pl.DataFrame, cost: str, optimizers: OptimizerStyle) -> None:
    """Write batch × devices at both ends of each frontier, beside what is drawn; the axes' limits must be final."""
    projected = points.filter(pl.col("kind") == "projected", MARKS[cost]).sort("train_seconds", cost)
    edges = {name: projected.filter(pl.col("optimizer") == name) for name in optimizers.names}
    places = {name: edge.select("train_seconds", cost).rows() for name, edge in edges.items()}
    labels = FreeLabels(ax, points.select("train_seconds", cost).rows(), places.values())
    for name, edge in edges.items():
        for row in [*edge[:1].iter_rows(named=True), *edge[1:][-1:].iter_rows(named=True)]:
            text = f"{fmt.tokens(row['global_batch_tokens'])} × {row['num_devices']}"
            labels.write(text, (row["train_seconds"], row[cost]), optimizers.colour(name))


def cues(estimates: Estimates, points: pl.DataFrame, cost: str | None) -> list[Any]:
    """Explain the marks of points; without a cost all of them are on the line that is drawn."""
    measured = pl.col("kind") == "measured"
    edge = pl.lit(True) if cost is None else pl.col(MARKS[cost])
    return contents.occurring(
        (style.cue("measured", marker="o"), points.filter(measured).height > 0),
        (style.cue("projected", marker="o", mfc="white"), points.filter(~measured, edge).height > 0),
        (style.cue("off the frontier", marker="o", **_OFF_FRONTIER), points.filter(~measured, ~edge).height > 0),
        (
            contents.interval_cue(estimates, upright=False),
            contents.any_interval(points.filter(measured | edge), "train_seconds"),
        ),
    )


def _figure(estimates: Estimates, cost: str | None) -> Drawing:
    """Draw a panel for each target and device: a cost over time or, without one, devices over time."""
    places = _places(estimates)
    if not places:
        return _nothing(estimates)
    with style.theme():
        optimizers = contents.optimizers(estimates)
        figure, axes = style.panels(len(places), height_inches=optimizers.panel_height_inches)
        for ax, heading in zip(axes, places, strict=True):
            style.heading(ax, heading)
        points = list(places.values())
        drawn = _over_devices(axes, points, optimizers) if cost is None else _costs(axes, points, cost, optimizers)
        handles = optimizers.handles(contents.values(drawn, "optimizer"))
        style.side_legend(figure, [*handles, *cues(estimates, drawn, cost)])
    return figure


def _costs(axes: list[Axes], places: list[pl.DataFrame], cost: str, optimizers: OptimizerStyle) -> pl.DataFrame:
    """Draw a cost against time into each panel; return what is drawn."""
    for ax, points in zip(axes, places, strict=True):
        draw(ax, points, cost, optimizers)
    style.y_label(axes, COST_LABELS[cost])
    set_axes(axes[0], cost)
    return pl.concat(places)


def _over_devices(axes: list[Axes], places: list[pl.DataFrame], optimizers: OptimizerStyle) -> pl.DataFrame:
    """Draw the fastest batch at each device count into each panel; return what is drawn."""
    unit, name = _unit(pl.concat(places))
    shown = [fastest_batches(points).with_columns(pl.col(_TIMES) / unit) for points in places]
    for ax, points in zip(axes, shown, strict=True):
        _draw_devices(ax, points, optimizers)
        ax.set_xlabel(f"Time to target ({name})")
    style.y_label(axes, "Devices")
    style.log_axis(axes[0], "x", "{:g}".format, footroom=0.1, headroom=0.1)
    _device_axis(axes[0], [count for points in shown for count in points["num_devices"]])
    for ax, points in zip(axes, shown, strict=True):
        _name_batches(ax, points, optimizers)
    return pl.concat(shown)


def _places(estimates: Estimates) -> dict[str, pl.DataFrame]:
    """Return the points of each panel by its heading: one target on one kind of device."""
    points = estimates.frontier.drop_nulls(["train_seconds", "device_seconds"])
    devices = contents.values(points, "device")
    return {
        f"target {fmt.loss(target)} nats/token" + (f", {device}" if len(devices) > 1 else ""): points.filter(
            pl.col("target_loss_nats") == target, pl.col("device") == device
        )
        for device in devices
        for target in contents.targets(estimates)
    }


def _nothing(estimates: Estimates) -> str:
    reached = estimates.cells["tokens_to_target"].is_not_null().any()
    return "No frontier: no run says how long it took." if reached else contents.nothing_reached(estimates)


def _intervals(ax: Axes, points: pl.DataFrame, cost: str, colour: Any) -> None:
    """Draw each point's interval of time, the cost moving with it."""
    known = points.drop_nulls(["train_seconds_low", "train_seconds_high"])
    for low, middle, high, value in known.select(*_TIMES, cost).iter_rows():
        across, up = (low, high), (value * low / middle, value * high / middle)
        ax.plot(across, (value, value) if cost == "num_devices" else up, color=colour, **_INTERVAL)


def _unit(points: pl.DataFrame) -> tuple[float, str]:
    """Return the unit of time of an axis: hours, unless all is over within one."""
    longest = max(points["train_seconds"].drop_nulls(), default=0.0)
    return (3600.0, "h") if longest > 3600.0 else (1.0, "s")


def _draw_devices(ax: Axes, points: pl.DataFrame, optimizers: OptimizerStyle) -> None:
    if points.is_empty():
        style.empty_panel(ax, "no run reached this target")
    for name in optimizers.names:
        for kind, face in (("projected", "white"), ("measured", optimizers.colour(name))):
            own = points.filter(pl.col("optimizer") == name, pl.col("kind") == kind)
            look = {"marker": optimizers.marker(name), "color": optimizers.colour(name), "mfc": face}
            ax.plot(own["train_seconds"], own["num_devices"], ls=optimizers.line_style(name), zorder=3, **look)
            _intervals(ax, own, "num_devices", optimizers.colour(name))


def _device_axis(ax: Axes, counts: list[int]) -> None:
    """Set up the log2 axis of devices, with at most eight ticks."""
    least, most = min(counts, default=1), max(counts, default=1)
    ax.set_yscale("log", base=2)
    ax.set_ylim(least / 1.6, most * 1.6)
    powers = range(least.bit_length() - 1, most.bit_length())
    ticks = [2**power for power in powers[:: -(-len(powers) // 8)]]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()


def _name_batches(ax: Axes, points: pl.DataFrame, optimizers: OptimizerStyle) -> None:
    """Write the batch beside the points where it changes along a line; measured ones only where none is projected."""
    ends = points.drop_nulls(_TIMES).select(*_TIMES, "num_devices").rows()
    whiskers = [((low, count), (high, count)) for low, _, high, count in ends]
    lines = dict(points.group_by("optimizer", "kind", maintain_order=True))
    places = {key: line.select("train_seconds", "num_devices").rows() for key, line in lines.items()}
    labels = FreeLabels(ax, points.select("train_seconds", "num_devices").rows(), [*places.values(), *whiskers])
    for (name, kind), line in lines.items():
        batches = line["global_batch_tokens"].to_list()
        for before, batch, place in zip([None, *batches], batches, places[name, kind], strict=False):
            if batch != before and (kind == "projected" or (name, "projected") not in lines):
                labels.write(fmt.tokens(batch), place, optimizers.colour(str(name)))
