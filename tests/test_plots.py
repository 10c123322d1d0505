import re
from dataclasses import replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import format as fmt
from analysis.estimate import Estimates, estimate, headline_target
from analysis.page import captions, figure_style, plots
from analysis.page import marks as look
from analysis.page.plots import FIGURES
from harness.optimizers.config import OPTIMIZERS
from tests.report_tables import complete, with_rivals
from tests.synthetic import Laboratory, Planted, plan, records

LAB = Laboratory()
#: Their lines have names, not a scale.
FORESTS = ("standings", "critical_batches", "ratio_decomposition")
FIVE = {
    name: Planted(t_min, 2_000.0)
    for name, t_min in zip(("adamw", "muon", "soap", "scion", "lion"), (18e4, 12e4, 13e4, 12.5e4, 2e5), strict=True)
}


@pytest.fixture(scope="module")
def pair() -> Estimates:
    return estimate(records(LAB))


@pytest.fixture(scope="module")
def whole(pair: Estimates) -> Estimates:
    return with_rivals(complete(pair))


@pytest.fixture(scope="module")
def short() -> Estimates:
    """AdamW's runs at the largest batch stop before the hardest target."""
    runs = [
        replace(run, budget=run.budget // 3 // 16384 * 16384) if (run.optimizer, run.batch) == ("adamw", 16384) else run
        for run in plan(LAB)
    ]
    return estimate(records(LAB, runs))


@pytest.fixture(scope="module")
def unreached() -> Estimates:
    return estimate(records(replace(LAB, targets=(1.2, 1.1))))


@pytest.fixture(scope="module")
def crowd() -> Estimates:
    return estimate(
        records(replace(LAB, optimizers=FIVE, batches=(256, 512, 1024, 2048, 4096, 16384), targets=(2.1, 2.0)))
    )


def texts(figure):
    if isinstance(figure, str):
        return figure
    return " ".join(text.get_text() for ax in figure.axes for text in ax.texts) + " ".join(
        text.get_text() for text in figure.texts
    )


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    with figure_style.theme():
        canvas.draw()
    return canvas.get_renderer()


def marks(ax, marker):
    return [line for line in ax.lines if line.get_marker() == marker]


def test_every_figure_has_a_caption_and_its_tables_exist():
    assert FIGURES.keys() == captions.FIGURES.keys()
    assert {table for caption in captions.FIGURES.values() for table in caption.tables} <= captions.TABLES.keys()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_where_every_table_has_rows(name, whole):
    assert isinstance(FIGURES[name](whole), Figure)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("sweep", ["whole", "crowd"])
def test_figure_is_labelled_and_its_legend_and_tick_labels_overlap_nothing(name, sweep, request):
    figure = FIGURES[name](request.getfixturevalue(sweep))
    if isinstance(figure, str):
        assert re.fullmatch(r"No .*\.", figure)
        return
    renderer = rendered(figure)
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    for ax in figure.axes:
        assert not any(legend.overlaps(ax.get_tightbbox(renderer)) for legend in legends)
        assert (
            ax.get_ylabel()
            or name in FORESTS
            or any(other.get_ylabel() and ax.get_shared_y_axes().joined(ax, other) for other in figure.axes)
        )
        assert ax.get_xlabel() or any(
            ax.get_shared_x_axes().joined(ax, other) for other in figure.axes if other is not ax
        )
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
            near = [box for box in boxes if ax.get_tightbbox(renderer).overlaps(box)]
            assert not any(a.overlaps(b) for place, a in enumerate(near) for b in near[:place])


def test_batch_axis_has_a_binary_label_at_each_batch(pair):
    ax = FIGURES["tokens_to_target"](pair).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "1K", "4K", "16K"]
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "Global batch size (tokens)"


def test_crowded_batches_keep_their_ticks_and_lose_labels():
    batches = (1024, 1088, 1152, 4096, 16384)
    _, (ax,) = figure_style.panels(1)
    figure_style.batch_axis(ax, batches)
    assert list(ax.get_xticks()) == list(batches)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1K", "", "", "4K", "16K"]


def test_tokens_figure_draws_the_tables_numbers(pair):
    ax = FIGURES["tokens_to_target"](pair).axes[-1]
    hardest = pair.cells.filter(pl.col("target_loss_nats") == 2.0)
    for optimizer, marker in (("adamw", "o"), ("muon", "s")):
        drawn = [line.get_ydata()[0] for line in marks(ax, marker)]
        assert drawn == pytest.approx(hardest.filter(pl.col("optimizer") == optimizer)["tokens_to_target"].to_list())
    fits = pair.fit_curves.filter(pl.col("target_loss_nats") == 2.0, pl.col("optimizer") == "muon")
    assert any(list(line.get_ydata()) == fits["tokens_to_target"].to_list() for line in ax.lines)


@pytest.mark.parametrize("quantity", ["tokens_to_target", "steps_to_target"])
def test_critical_batch_stands_where_twice_the_least_tokens_are_spent_at_any_exponent(pair, quantity):
    bent = pair.critical_batches.with_columns(s_min_steps=pl.lit(None, pl.Float64))
    ax = FIGURES[quantity](replace(pair, critical_batches=bent)).axes[-1]
    critical = bent.filter(pl.col("target_loss_nats") == 2.0, pl.col("definition") == "emin_over_smin")
    stars = sorted((star.get_xdata()[0], star.get_ydata()[0]) for star in marks(ax, "*"))
    sizes, least = critical["critical_batch_tokens"], critical["t_min_tokens"]
    heights = 2 * least if quantity == "tokens_to_target" else 2 * least / sizes
    assert stars == [pytest.approx(point) for point in sorted(zip(sizes, heights, strict=True))]


def test_a_caveat_is_drawn_hollow(pair):
    caveats = pair.cells.filter(pl.col("verdict") == "warmup_confounded", pl.col("target_loss_nats") == 2.2)
    hollow = [
        line
        for line in marks(FIGURES["tokens_to_target"](pair).axes[0], "s")
        if to_hex(line.get_markerfacecolor()) == "#ffffff"
    ]
    assert len(hollow) == caveats.height > 0


def test_a_cell_that_fell_short_is_an_arrow_at_the_top_edge(short):
    ax = FIGURES["tokens_to_target"](short).axes[-1]
    places = [(x, y) for line in marks(ax, look.UP) for x, y in zip(*line.get_data(), strict=True)]
    assert places == [(pytest.approx(16384, rel=0.05), look.TOP_EDGE)]
    assert not marks(ax, look.DOWN)
    assert "some fell short" in texts(ax.figure)


def test_a_cell_at_the_target_at_once_is_an_arrow_at_the_bottom_edge():
    lab = replace(LAB, first_mark_tokens=32_768, batches=(1024, 4096, 16384), targets=(2.0,))
    at_once = ("confirm", "adamw", 16384)
    runs = [replace(r, log_tokens=9.0) if (r.stage, r.optimizer, r.batch) == at_once else r for r in plan(lab)]
    figure = FIGURES["headline"](estimate(records(lab, runs)))
    places = [(x, y) for line in marks(figure.axes[0], look.DOWN) for x, y in zip(*line.get_data(), strict=True)]
    assert places == [(pytest.approx(16384, rel=0.05), look.BOTTOM_EDGE)]
    assert not marks(figure.axes[0], look.UP)
    assert "reached before the\nfirst evaluation" in legend(figure)
    assert "not reached by all" not in legend(figure)


def test_batches_that_fell_short_at_the_same_rate_do_not_hide_each_other():
    lab = replace(LAB, optimizers={"adamw": replace(LAB.optimizers["adamw"])}, targets=(2.0,))
    runs = [replace(run, peak_lr=0.1, log_tokens=99.0) if run.seed == 1 else run for run in plan(lab)]
    figure = FIGURES["learning_rates"](estimate(records(lab, runs)))
    arrows = marks(figure.axes[0], look.UP)
    places = sorted(float(line.get_xdata()[0]) for line in arrows)
    assert len(places) == len(LAB.batches)
    assert len({to_hex(line.get_color()) for line in arrows}) == len(LAB.batches)
    assert all(larger > smaller * 1.05 for smaller, larger in pairwise(places))
    assert (places[0] * places[-1]) ** 0.5 == pytest.approx(0.1)


def test_learning_rate_at_which_runs_were_at_the_target_at_once_is_an_arrow_at_the_bottom_edge():
    lab = replace(LAB, first_mark_tokens=32_768, batches=(1024, 4096, 16384), targets=(2.0,))
    highest = max(run.peak_lr for run in plan(lab) if run.optimizer == "adamw")
    runs = [replace(r, log_tokens=9.0) if (r.optimizer, r.peak_lr) == ("adamw", highest) else r for r in plan(lab)]
    figure = FIGURES["learning_rates"](estimate(records(lab, runs)))
    places = [(x, y) for line in marks(figure.axes[0], look.DOWN) for x, y in zip(*line.get_data(), strict=True)]
    assert places == [(pytest.approx(highest), look.BOTTOM_EDGE)]
    assert not marks(figure.axes[0], look.UP)
    assert "reached before the\nfirst evaluation" in legend(figure)
    assert "a run fell short" not in legend(figure)


def test_learning_rate_at_which_runs_fell_short_is_an_arrow(short):
    upper = FIGURES["learning_rates"](short).axes[0]
    fell_short = short.rates.filter(
        pl.col("target_loss_nats") == 2.0, pl.col("optimizer") == "adamw", pl.col("tokens_to_target").is_null()
    )
    at_top = [x for line in marks(upper, look.UP) for x in line.get_xdata()]
    assert sorted(at_top) == sorted(fell_short["peak_lr"]) != []


@pytest.mark.parametrize("name", FIGURES)
def test_a_sweep_without_estimates_is_answered_in_words(name, unreached):
    figure = FIGURES[name](unreached)
    if name not in ("coverage", "loss_curves", "equal_budget"):
        assert re.search(r"reach|^No .*\.$", texts(figure))
    assert isinstance(figure, str) or figure_style.png_bytes(figure)


@pytest.mark.parametrize(
    "changes", [{"batches": (1024,)}, {"optimizers": {"muon": Planted()}}, {"rates": (1.0,), "targets": (2.0,)}]
)
def test_every_figure_draws_a_meagre_sweep(changes):
    meagre = estimate(records(replace(LAB, **changes)))
    for draw in FIGURES.values():
        figure = draw(meagre)
        assert isinstance(figure, str) or rendered(figure)


def test_ratios_are_drawn_with_a_line_at_equal_tokens(pair):
    ax = FIGURES["token_ratios"](pair).axes[0]
    assert any(set(line.get_ydata()) == {1.0} for line in ax.lines)
    drawn = {round(float(y), 6) for line in ax.lines if line.get_marker() != "None" for y in line.get_ydata()}
    assert drawn == {round(ratio, 6) for ratio in pair.token_ratios["token_ratio"]}


@pytest.mark.parametrize(
    ("draw", "cost", "flag"),
    [
        (FIGURES["frontier_device_seconds"], "device_seconds", "on_frontier"),
        (FIGURES["frontier_flops"], "train_flops", "on_flops_frontier"),
    ],
)
def test_frontier_line_joins_the_projected_points_of_its_own_cost(draw, cost, flag, pair):
    ax = draw(pair).axes[-1]
    edge = pair.frontier.filter(
        pl.col("optimizer") == "adamw", pl.col("kind") == "projected", pl.col("target_loss_nats") == 2.0, flag
    ).sort("train_seconds")
    lines = [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "-"]
    assert edge[cost].to_list() in lines


def test_headline_names_the_ends_of_each_frontier_where_nothing_is_drawn(pair):
    figure = FIGURES["headline"](pair)
    ax, renderer = figure.axes[1], rendered(figure)
    edge = pair.frontier.filter(pl.col("target_loss_nats") == 2.0, pl.col("kind") == "projected", "on_frontier").sort(
        "train_seconds"
    )
    rows = [edge.filter(pl.col("optimizer") == name).rows(named=True) for name in ("adamw", "muon")]
    ends = [row for own in rows for row in (own[0], own[-1])]
    labels = [label for label in ax.texts if re.fullmatch(r"\w+ × \d+", label.get_text())]
    assert {label.get_text() for label in labels} <= {
        f"{fmt.tokens(row['global_batch_tokens'])} × {row['num_devices']}" for row in ends
    }
    assert len(labels) == len(ends)
    boxes = [label.get_window_extent(renderer) for label in labels]
    assert not any(a.overlaps(b) for place, a in enumerate(boxes) for b in boxes[:place])
    drawn = [point for line in ax.lines for point in ax.transData.transform(line.get_xydata())]
    assert not any(box.contains(*point) for box in boxes for point in drawn)


def test_fitted_quadratic_passes_through_the_fitted_tokens(pair):
    own = pair.rates.filter(
        pl.col("target_loss_nats") == 2.0, pl.col("optimizer") == "adamw", pl.col("global_batch_tokens") == 256
    )
    line = next(line for line in FIGURES["learning_rates"](pair).axes[0].lines if len(line.get_xdata()) == 50)
    ends = own.sort("peak_lr")["fitted_tokens"].to_list()
    assert (line.get_ydata()[0], line.get_ydata()[-1]) == pytest.approx((ends[0], ends[-1]))
    curvatures = [second - first for first, second in pairwise(b - a for a, b in pairwise(np.log(line.get_ydata())))]
    assert curvatures == pytest.approx([curvatures[0]] * len(curvatures))


def test_headline_says_projected(pair):
    assert "Projected" in FIGURES["headline"](pair).axes[1].get_title(loc="left")


def test_headline_target_is_the_hardest_that_all_optimizers_reached_twice(pair, short, unreached):
    assert headline_target(pair) == 2.0
    assert headline_target(unreached) is None
    missing = short.cells.with_columns(
        pl.when(
            (pl.col("target_loss_nats") < 2.15)
            & (pl.col("optimizer") == "adamw")
            & (pl.col("global_batch_tokens") > 256)
        )
        .then(None)
        .otherwise("tokens_to_target")
        .alias("tokens_to_target")
    )
    assert headline_target(replace(short, cells=missing)) == 2.2


def test_optimizer_keeps_its_colour_and_marker_without_the_others():
    both, alone = figure_style.OptimizerStyle(["adamw", "muon"]), figure_style.OptimizerStyle(["muon"])
    assert (both.colour("muon"), both.marker("muon")) == (alone.colour("muon"), alone.marker("muon"))
    crowd = figure_style.OptimizerStyle(list(FIVE))
    assert len({to_hex(crowd.colour(name)) for name in FIVE}) == len({crowd.marker(name) for name in FIVE}) == 5


@pytest.mark.parametrize("save", [figure_style.svg_bytes, figure_style.png_bytes])
def test_equal_estimates_give_equal_bytes(save, pair):
    assert save(FIGURES["headline"](pair)) == save(FIGURES["headline"](pair))


def test_drawing_leaves_no_global_settings_behind(pair):
    before = dict(mpl.rcParams)
    figure_style.svg_bytes(FIGURES["loss_curves"](pair))
    assert dict(mpl.rcParams) == before


def test_loss_curves_show_the_chosen_rate_only(pair):
    ax = FIGURES["loss_curves"](pair).axes[0]
    chosen = pair.cells.filter(pl.col("optimizer") == "adamw", pl.col("target_loss_nats") == 2.0)
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(lines) == chosen["num_seeds"].sum() + 2 * chosen.height


def legend(figure):
    return {text.get_text() for side in figure.legends for text in side.get_texts()}


def test_legend_lists_only_what_is_drawn(pair, short):
    assert not any("not reached" in label for label in legend(FIGURES["headline"](pair)))
    assert "not reached by all" in legend(FIGURES["headline"](short))
    assert "a run fell short" not in legend(FIGURES["learning_rates"](pair))
    assert "a run fell short" in legend(FIGURES["learning_rates"](short))
    assert "with a caveat" not in legend(FIGURES["headline"](without_caveats(pair)))
    assert "with a caveat" not in legend(FIGURES["token_ratios"](without_caveats(pair)))


def without_caveats(estimates):
    names = ("cells", "critical_batches", "token_ratios")
    frames = {name: getattr(estimates, name).with_columns(verdict=pl.lit("ok")) for name in names}
    return replace(estimates, **frames)


@pytest.mark.parametrize("kind", ["measured", "projected"])
def test_legend_of_the_frontier_lists_only_its_kinds_of_points(kind, pair):
    points = pair.frontier.filter(pl.col("kind") == kind)
    drawn = legend(FIGURES["frontier_device_seconds"](replace(pair, frontier=points.filter("on_frontier"))))
    assert drawn == {"AdamW", "Muon", kind, "90% interval"}


def test_legend_lists_only_optimizers_that_are_drawn(pair):
    alone = replace(pair, frontier=pair.frontier.filter(pl.col("optimizer") == "muon"))
    assert "AdamW" not in legend(FIGURES["frontier_flops"](alone))
    no_interval = pl.lit(None, pl.Float64)
    bare = pair.equal_budget.with_columns(val_loss_nats_low=no_interval, val_loss_nats_high=no_interval)
    bare = replace(pair, equal_budget=bare.filter(pl.col("optimizer") == "muon"))
    assert legend(FIGURES["equal_budget"](bare)) == {"Muon"}


def test_equal_budget_without_marks_beyond_the_warmup_says_so():
    figure = FIGURES["equal_budget"](estimate(records(replace(LAB, warmup_tokens=10**7))))
    assert isinstance(figure, str)
    assert "beyond the largest warmup (10.0M tokens)" in texts(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_every_panel_of_a_figure_read_mid_schedule_says_so_above_its_title(name, whole):
    sound, biased = (plots.draw(name, whole, protocol) for protocol in ("constant_ema", "mid_schedule"))
    titles, tagged = ([ax.get_title(loc="left") for ax in figure.axes] for figure in (sound, biased))
    assert any(titles)
    assert tagged == [f"Biased: read while the rate decays\n{title}" if title else "" for title in titles]
    boxes = [title.get_window_extent(rendered(biased)) for title in biased.findobj(is_tag)]
    assert not any(a.overlaps(b) for place, a in enumerate(boxes) for b in boxes[:place])


def is_tag(artist):
    return isinstance(artist, Text) and artist.get_text().startswith("Biased")


def test_all_optimizers_differ_in_colour_and_in_marker():
    everyone = figure_style.OptimizerStyle(list(OPTIMIZERS))
    assert len({to_hex(everyone.colour(name)) for name in everyone.names}) == len(OPTIMIZERS)
    assert len({everyone.marker(name) for name in everyone.names}) == len(OPTIMIZERS)


def test_standings_are_ordered_by_the_largest_batch_and_black_where_holm_resolves_them():
    noisy = {
        "lamb": Planted(100_000.0, 1_000.0),
        "lion": Planted(178_000.0, 2_000.0),
        "muon": Planted(90_000.0, 4_000.0),
    }
    estimates = estimate(records(Laboratory(optimizers={"adamw": Planted(180_000.0, 2_000.0), **noisy})))
    figure = FIGURES["standings"](estimates)
    assert isinstance(figure, Figure)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    largest = estimates.token_ratios.filter(global_batch_tokens=16384, target_loss_nats=2.0)
    assert labels == [fmt.optimizer_name(name) for name in largest.sort("token_ratio", descending=True)["challenger"]]
    resolved = {name for name, p in largest.select("challenger", "p_value_holm").rows() if p < 0.1}
    assert "muon" in resolved
    assert "lion" not in resolved
    marks = [line for line in figure.axes[-1].lines if line.get_marker() == "o"]
    black = {
        labels[-round(float(np.ravel(line.get_ydata())[0]))] for line in marks if line.get_color() == figure_style.INK
    }
    assert black == {fmt.optimizer_name(name) for name in resolved}


def test_standings_of_few_optimizers_are_words(pair: Estimates):
    assert "fewer than three" in str(FIGURES["standings"](pair))


def test_many_optimizers_are_drawn_without_bands_and_critical_batches():
    rivals = {f"rival{place}": Planted(150_000.0 - 9_000 * place, 2_500.0) for place in range(5)}
    crowd = estimate(records(Laboratory(optimizers={"adamw": Planted(180_000.0, 2_000.0), **rivals})))
    figure = FIGURES["tokens_to_target"](crowd)
    assert isinstance(figure, Figure)
    for ax in figure.axes:
        assert not ax.collections
        assert "*" not in {line.get_marker() for line in ax.lines}
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"AdamW", "rival4"}
