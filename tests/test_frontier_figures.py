"""Figures of time against compute: what is drawn is what the table says; devices have panels of their own."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.estimate import Estimates, estimate
from analysis.page import figure_style, frontier_figures
from analysis.page.free_labels import FreeLabels
from analysis.quantities.frontier import MARKS
from tests.synthetic import Laboratory, records
from tests.test_cost_model import with_runs

LAB = Laboratory(targets=(2.1, 2.0))
DRAW = {"device_seconds": frontier_figures.device_seconds, "train_flops": frontier_figures.flops}


@pytest.fixture(scope="module")
def pair() -> Estimates:
    return estimate(records(LAB))


@pytest.fixture(scope="module")
def two_devices() -> Estimates:
    name = pl.when(pl.col("init_seed") == 0).then(pl.lit("A100")).otherwise(pl.lit("H200"))
    return estimate(with_runs(records(replace(LAB, targets=(2.0,), fresh_seeds=())), name.alias("device")))


def figure_of(drawing: Figure | str) -> Figure:
    assert isinstance(drawing, Figure), drawing
    return drawing


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for own in figure.legends for text in own.get_texts()]


def lines(ax: Axes) -> list[list[tuple[float, float]]]:
    return [list(zip(*line.get_data(), strict=True)) for line in ax.lines]


@pytest.mark.parametrize(("cost", "mark"), MARKS.items())
def test_a_line_joins_the_projected_points_of_its_own_frontier(cost: str, mark: str, pair: Estimates) -> None:
    ax = figure_of(DRAW[cost](pair)).axes[-1]
    edge = pair.frontier.filter(pl.col(mark), target_loss_nats=2.0, optimizer="muon", kind="projected")
    assert edge.height > 1
    assert edge.sort("train_seconds").select("train_seconds", cost).rows() in lines(ax)


@pytest.mark.parametrize("cost", MARKS)
def test_intervals_move_time_and_cost_by_one_factor(cost: str, pair: Estimates) -> None:
    ax = figure_of(DRAW[cost](pair)).axes[-1]
    own = pair.frontier.filter(target_loss_nats=2.0, kind="measured", optimizer="adamw").row(0, named=True)
    factors = [own[f"train_seconds_{end}"] / own["train_seconds"] for end in ("low", "high")]
    expected = [(own["train_seconds"] * factor, own[cost] * factor) for factor in factors]
    assert any(np.allclose(line, expected, rtol=1e-9) for line in lines(ax) if len(line) == 2)


def test_points_without_an_interval_have_none_drawn_nor_explained(pair: Estimates) -> None:
    bare = pair.frontier.with_columns(train_seconds_low=None, train_seconds_high=None)
    frame = bare.with_columns(pl.col("train_seconds_low", "train_seconds_high").cast(pl.Float64))
    figure = figure_of(frontier_figures.device_seconds(replace(pair, frontier=frame)))
    assert "90% interval" not in legend(figure)
    assert len(lines(figure.axes[0])) == 6  # off, edge and measured points of two optimizers


def test_each_device_has_panels_of_its_own(two_devices: Estimates) -> None:
    for draw in (*DRAW.values(), frontier_figures.devices):
        titles = [ax.get_title(loc="left") for ax in figure_of(draw(two_devices)).axes]
        assert titles == ["target 2.0 nats/token, A100", "target 2.0 nats/token, H200"]


def test_points_at_are_those_of_the_device_of_most_runs(two_devices: Estimates) -> None:
    """Three runs alone are relabelled A100, which is first by its name."""
    few = pl.when(pl.int_range(pl.len()) < 3).then(pl.lit("A100")).otherwise(pl.lit("H200"))
    made = replace(two_devices, records=with_runs(two_devices.records, few.alias("device")))
    assert set(frontier_figures.points_at(made, 2.0)["device"]) == {"H200"}


def test_devices_figure_draws_the_fastest_batch_of_each_device_count(pair: Estimates) -> None:
    figure = figure_of(frontier_figures.devices(pair))
    ax = figure.axes[-1]
    projected = pair.frontier.filter(target_loss_nats=2.0, optimizer="muon", kind="projected")
    best = projected.group_by("num_devices").agg(pl.col("train_seconds").min()).sort("num_devices")
    assert (best["train_seconds"].diff().drop_nulls() < 0).all()
    assert best.select("train_seconds", "num_devices").rows() in lines(ax)
    assert ax.get_xlabel() == "Time to target (s)"
    assert figure.axes[0].get_ylabel() == "Devices"
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["1", "2", "4", "8", "16", "32", "64"]


def test_devices_figure_names_the_batch_where_it_changes(pair: Estimates) -> None:
    ax = figure_of(frontier_figures.devices(pair)).axes[-1]
    assert sorted(text.get_text() for text in ax.texts) == ["16K", "16K", "1K", "1K", "4K", "4K"]


def test_devices_figure_leaves_out_devices_that_save_no_time(pair: Estimates) -> None:
    points = pair.frontier.filter(target_loss_nats=2.0, optimizer="muon", kind="projected")
    slow = pl.when(pl.col("num_devices") == 16).then(1e3).otherwise("train_seconds").alias("train_seconds")
    shown = frontier_figures.fastest_batches(points.with_columns(slow))
    assert shown["num_devices"].to_list() == [1, 2, 4, 8, 32, 64]


def test_devices_figure_of_long_runs_is_in_hours(pair: Estimates) -> None:
    times = [f"train_seconds{end}" for end in ("", "_low", "_high")]
    long = replace(pair, frontier=pair.frontier.with_columns(pl.col(times) * 36_000))
    ax = figure_of(frontier_figures.devices(long)).axes[-1]
    assert ax.get_xlabel() == "Time to target (h)"
    longest = pair.frontier.filter(target_loss_nats=2.0, num_devices=1)["train_seconds"].min() * 10
    assert any(x == pytest.approx(longest) for line in lines(ax) for x, _ in line)


def test_figures_say_in_words_why_there_is_nothing_to_draw(pair: Estimates) -> None:
    untimed = replace(pair, frontier=pair.frontier.clear())
    unreached = replace(untimed, cells=pair.cells.with_columns(tokens_to_target=pl.lit(None, dtype=pl.Float64)))
    for draw in (*DRAW.values(), frontier_figures.devices):
        assert draw(untimed) == "No frontier: no run says how long it took."
        assert "No run has reached a target loss yet" in str(draw(unreached))


def test_labels_cover_neither_points_nor_each_other() -> None:
    """All eight places around a point lie on another point: nothing is written."""
    with figure_style.theme():
        _, (ax,) = figure_style.panels(1)
    ax.set(xlim=(0, 10), ylim=(0, 10))
    labels = FreeLabels(ax, [(5.0, 5.0)], [])
    for _ in range(9):
        labels.write("16K × 8", (5.0, 5.0), "black")
    places = [text.get_position() for text in ax.texts]
    assert len(places) == len(set(places)) <= 8
    crowd = [(x / 10, y / 10) for x in range(101) for y in range(101)]
    FreeLabels(ax, crowd, []).write("hidden", (5.0, 5.0), "black")
    assert "hidden" not in {text.get_text() for text in ax.texts}


def test_labels_stay_inside_the_panel() -> None:
    with figure_style.theme():
        _, (ax,) = figure_style.panels(1)
    ax.set(xlim=(0, 10), ylim=(0, 10))
    labels = FreeLabels(ax, [(10.0, 10.0)], [])
    labels.write("16K", (10.0, 10.0), "black")
    (text,) = ax.texts
    assert text.get_position()[0] < 0
    assert text.get_position()[1] < 0
