"""The verbs about models of many widths: coord-check, transfer, telescope. Heavy imports stay inside."""

import argparse
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arguments import count
from sweeps.arguments import (
    planned,
    print_table,
    results_option,
    settings_option,
    slots_option,
    started_folder,
    sweep_option,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl
    from matplotlib.figure import Figure
    from rich.table import Table

    from sweeps.spec import SweepSpec
    from sweeps.widths.telescope import Found

_CHECKED = ("adamw", "muon,scale=match_rms_adamw", "muon,scale=spectral", "scion", "lamb")


def add_verbs(verbs: Any) -> None:
    """Add the verbs to `verbs`, what `ArgumentParser.add_subparsers` returned."""
    verb = verbs.add_parser(
        "coord-check",
        parents=[results_option()],
        help="how activations and updates grow with the width, in a few steps",
    )
    verb.add_argument("--widths", metavar="N,N", type=counts, default=(64, 128, 256, 512), help="default: 64 to 512")
    verb.add_argument(
        "--optimizer", metavar="NAME,K=V", action="append", dest="optimizers",
        help=f"with its settings, as muon,scale=spectral; repeatable (default: {' '.join(_CHECKED)})",
    )  # fmt: skip
    verb.add_argument(
        "--parametrization", choices=["standard", "mup"], action="append", dest="parametrizations",
        help="default: both; the smallest width is the base",
    )  # fmt: skip
    verb.add_argument("--head-width", metavar="N", type=count, default=16, help="the same at every width (default: 16)")
    verb.add_argument("--steps", metavar="N", type=count, default=3, help="optimizer steps (default: 3)")
    verb.add_argument("--seeds", metavar="N", type=count, default=2, help="of weights and data (default: 2)")
    verb.set_defaults(verb=coord_check)
    verb = verbs.add_parser(
        "transfer", parents=[results_option()], help="the best learning rate over widths, and how it moves"
    )
    verb.add_argument("sweep", metavar="SWEEP", help="name or folder of a sweep that was started, or of its records")
    verb.set_defaults(verb=transfer, settings=[])
    parents = [sweep_option(), settings_option(), results_option(), slots_option()]
    verb = verbs.add_parser(
        "telescope", parents=parents, help="tune at the smallest width, then on smaller grids at each doubled one"
    )
    verb.set_defaults(verb=telescope)


def counts(text: str) -> tuple[int, ...]:
    """Read `64,128,256`: two different whole numbers at least."""
    found = tuple(sorted({count(part) for part in text.split(",")}))
    if len(found) < 2:
        raise ArgumentTypeError(f"expected two widths or more, joined by commas, not {text!r}")
    return found


def coord_check(options: argparse.Namespace) -> int:
    """Train a few steps over widths; print the slopes, write tables and figures."""
    import torch

    from analysis.page.coordinates_figure import coordinates
    from analysis.quantities.width_slopes import SIZES, width_slopes
    from harness.config import CorpusConfig
    from harness.corpus import prepare
    from sweeps.widths.coordinates import check_runs, measure

    torch.set_num_threads(1)
    config = CorpusConfig(source="python-stdlib", tokenizer="ascii")
    runs = check_runs(
        optimizers=options.optimizers or _CHECKED,
        parametrizations=options.parametrizations or ("standard", "mup"),
        widths=options.widths,
        head_width=options.head_width,
        steps=options.steps,
        seeds=options.seeds,
        corpus=config,
    )
    sizes = measure(runs, prepare(config))
    slopes = width_slopes(sizes)
    folder = Path(options.results) / "coord-check"
    _write_tables(folder, {"sizes": sizes, "slopes": slopes})
    for size in SIZES:
        _write_figure(folder, size, coordinates(sizes, slopes, size))
    print_table(_slopes_table(slopes))
    print(f"Tables and figures: {folder}")
    return 0


def _slopes_table(slopes: "pl.DataFrame") -> "Table":
    """Return a row per optimizer, parametrization and role, a column per size."""
    import polars as pl

    from analysis.page.coordinates_figure import slope_in_words
    from analysis.quantities.width_slopes import SIZES
    from sweeps.printing import narrow_table

    table = narrow_table()
    table.title = "Slope of log size in log width, 90 % interval"
    for heading in ("optimizer", "parametrization", "role", "activation", "its change", "update ΔW·x"):
        table.add_column(heading, no_wrap=True)
    by_role = slopes.filter(pl.col("layer").is_null())
    for key, own in by_role.group_by("optimizer", "parametrization", "role", maintain_order=True):
        table.add_row(*map(str, key), *(slope_in_words(own.filter(size=size)) for size in SIZES))
    return table


def transfer(options: argparse.Namespace) -> int:
    """Print the best rate of every width and its slope; write tables and the figure."""
    from analysis.inputs.records import load
    from analysis.page.transfer_figure import transfer as drawn
    from analysis.quantities.transfer import best_rates, rate_slopes, width_losses

    folder = started_folder(options).path
    losses = width_losses(load(folder))
    rates, slopes = best_rates(losses), rate_slopes(losses)
    _write_tables(folder, {"transfer_rates": rates, "transfer_slopes": slopes})
    _write_figure(folder, "transfer", drawn(losses, rates, slopes))
    print_table(_rates_table(rates, slopes))
    if losses["tuning"].n_unique() > 1:
        print("Settings tuned beside the rate differ from width to width: the slope is theirs too.")
    print(f"Tables and figure: {folder / 'tables'}, {folder / 'figures' / 'transfer.png'}")
    return 0


def telescope(options: argparse.Namespace) -> int:
    """Telescope the sweep; print levels, cost and the optimum of the final width, write tables, figure and page."""
    from sweeps.store import write_sweep
    from sweeps.widths import telescope as through
    from sweeps.widths.families import families

    plan, spec, runs, folder = planned(options)
    found_families = families(runs)
    base = through.base_runs(found_families, runs)
    write_sweep(spec, base, folder, like=runs)
    print(f"{spec.name}: {len(base):,} runs at the base width, then fewer at each doubling, in {folder.path}")
    found = through.telescoped(folder, found_families, plan.slots)
    for each in found:
        print_table(_levels_table(through.levels_table([each])))
    sentences = through.in_words(found)
    print(*sentences, _write_telescope(found, sentences, spec, folder.path), sep="\n")
    return 0


def _write_telescope(found: "Sequence[Found]", sentences: "Sequence[str]", spec: "SweepSpec", folder: Path) -> Path:
    """Write the records as Parquet, tables, figure and page; return the page's place."""
    from analysis.inputs.records import load, save
    from analysis.page.figure_style import svg_bytes
    from analysis.page.telescope_figure import surfaces
    from analysis.page.telescope_page import telescope_page
    from harness.record import write_atomically
    from sweeps.widths import telescope as through

    save(load(folder), folder)
    points, levels = through.points_table(found), through.levels_table(found)
    tables = {"telescope_answers": through.answers_table(found), "telescope_levels": levels, "telescope_points": points}
    figure = surfaces(points, levels)
    _write_tables(folder, tables)
    _write_figure(folder, "telescope", figure)
    page = telescope_page(spec.name, spec.description, sentences, svg_bytes(figure), tables)
    write_atomically(folder / "telescope.html", page)
    return folder / "telescope.html"


def _write_tables(folder: Path, tables: "Mapping[str, pl.DataFrame]") -> None:
    from harness.record import write_atomically

    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        write_atomically(folder / "tables" / f"{name}.csv", frame.write_csv().encode())


def _write_figure(folder: Path, name: str, figure: "Figure") -> None:
    from analysis.page.figure_style import png_bytes, svg_bytes
    from harness.record import write_atomically

    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "figures" / f"{name}.png", png_bytes(figure))
    write_atomically(folder / "figures" / f"{name}.svg", svg_bytes(figure))


def _rates_table(rates: "pl.DataFrame", slopes: "pl.DataFrame") -> "Table":
    """Return a row per series and width; the slope stands in the first of a series."""
    from analysis import format as fmt
    from analysis.page.coordinates_figure import slope_in_words
    from analysis.quantities.transfer import SERIES
    from sweeps.printing import narrow_table

    table = narrow_table()
    for heading in ("optimizer", "parametrization", "batch", "width", "best rate", "90 % interval", "verdict", "slope"):
        table.add_column(heading, no_wrap=True)
    for series in slopes.iter_rows(named=True):
        key = {name: series[name] for name in SERIES}
        slope = slope_in_words(slopes.filter(**key))
        for row in rates.filter(**key).iter_rows(named=True):
            known = row["best_lr_low"] is not None
            names = (key["optimizer"], key["parametrization"], f"{key['global_batch_tokens']:,}", f"{row['width']}")
            rate = fmt.MISSING if row["best_lr"] is None else f"{row['best_lr']:.3g}"
            interval = f"{row['best_lr_low']:.3g} to {row['best_lr_high']:.3g}" if known else fmt.MISSING
            table.add_row(*names, rate, interval, row["verdict"], slope)
            slope = ""
    return table


def _levels_table(levels: "pl.DataFrame") -> "Table":
    """Return a row per width and hyperparameter."""
    from analysis.format import MISSING
    from sweeps.printing import narrow_table

    table = narrow_table()
    for heading in (
        "width",
        "points",
        "hyperparameter",
        "optimum",
        "± (log2)",
        "mesh\nerror",
        "finite-width\nerror",
        "lowest\nloss",
        "FLOPs",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in levels.iter_rows(named=True):
        errors = (row[f"{name}_error_log2"] for name in ("optimum", "mesh", "finite_width"))
        written = (MISSING if each is None else f"{each:.2f}" for each in errors)
        table.add_row(
            f"{row['width']}",
            f"{row['points']}",
            row["hyperparameter"].removeprefix("optimizer."),
            f"{row['optimum']:.3g}",
            *written,
            f"{row['lowest_loss_nats']:.4f}",
            f"{row['level_flops']:.3g}",
        )
    return table
