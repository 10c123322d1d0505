"""A sweep's report: one self-contained HTML file, and the figures and tables behind it.

Equal estimates give equal files, byte for byte.
"""

import dataclasses
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import captions
from analysis.page.answer import DEFINITION, answers, lead
from analysis.page.html_table import HtmlTable, html_table
from analysis.quantities.frontier import cpu_shares
from analysis.schemas import RUNS, TABLES
from harness.record import write_atomically

_PROVENANCE = (
    "corpus", "corpus_fingerprint", "vocab_size", "sequence_length", "model", "num_params", "flops_convention",
    "schedule", "warmup_tokens", "averaging", "protocol", "precision", "init_seed", "data_seed", "device",
    "num_devices", "threads", "micro_batch_tokens", "compiled", "python_version", "torch_version", "lightning_version",
    "code_commit", "science_version",
)  # fmt: skip
_PROBLEM_COLUMNS = ["run_id", "stage", "status", "stop_reason", "tokens_seen", "token_budget"]


#: Tables of single runs, whose integers are written in full.
_EXACT = ("runs", "targets")


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as files and as an inline element, with its caption."""

    name: str
    kind: str
    model: str
    caption: captions.Caption
    inline_svg: str


def write_report(estimates: Estimates, folder: Path, reference: Path | None = None) -> Path:
    """Write report.html, figures/*.svg and *.png, tables/*.csv into `folder`, each whole or not at all.

    `reference` is the folder that `estimates.agreement` compares with; the report names it.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    for name, frame in _frames(estimates).items():
        write_atomically(folder / "tables" / f"{name}.csv", frame.write_csv().encode())
    figures = list(_draw(estimates, folder / "figures"))
    path = folder / "report.html"
    write_atomically(path, _render(estimates, figures, reference).encode())
    return path


def models(estimates: Estimates) -> dict[str, Estimates]:
    """Split the estimates by model: figures and answers never mix two."""
    return {name: _of_model(estimates, name) for name in sorted(estimates.records.runs["model"].unique())}


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


def _draw(estimates: Estimates, folder: Path) -> Iterator[DrawnFigure]:
    from analysis.page import figure_style, plots  # seaborn takes seconds to import

    parts = models(estimates)
    for model, part in parts.items():
        for figure_name, draw in plots.FIGURES.items():
            name = figure_name if len(parts) == 1 else f"{figure_name}-{_file_name(model)}"
            caption = captions.FIGURES[figure_name]
            figure = draw(part)
            svg = figure_style.svg_bytes(figure)
            write_atomically(folder / f"{name}.svg", svg)
            write_atomically(folder / f"{name}.png", figure_style.png_bytes(figure))
            yield DrawnFigure(name, figure_name, model, caption, inline_svg(svg, name.replace(".", "_"), caption.title))


def _file_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", model)


def _render(estimates: Estimates, figures: list[DrawnFigure], reference: Path | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("analysis.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    frames = _frames(estimates)
    tables = [
        _table(name, frames[name])
        for name in captions.TABLES
        if name not in ("cost_model", "agreement", "fit_curves", "evaluations")
    ]
    return environment.get_template("report.html.j2").render(
        manifest=estimates.records.manifest,
        level=f"{estimates.level:.0%}",
        definition=DEFINITION.format(baseline=fmt.optimizer_name(estimates.records.manifest.baseline)),
        leads={name: lead(part) for name, part in models(estimates).items()},
        answers={name: answers(part) for name, part in models(estimates).items()},
        figures=figures,
        tables=tables,
        cost_model=_table("cost_model", estimates.cost_model),
        agreement=_table("agreement", estimates.agreement),
        agreement_words=_agreement_words(estimates.agreement, reference),
        definitions=captions.DEFINITIONS,
        provenance=_provenance(estimates),
        problems=_problems(estimates),
        loss=fmt.loss,
    )


def _frames(estimates: Estimates) -> dict[str, pl.DataFrame]:
    """Return every table by the name of its file."""
    frames = {name: getattr(estimates, name) for name in TABLES}
    return frames | {"runs": estimates.records.runs.drop("config_json"), "evaluations": estimates.records.evaluations}


def _table(name: str, frame: pl.DataFrame) -> HtmlTable:
    columns = TABLES.get(name, RUNS)
    return html_table(name, captions.TABLES[name], frame, columns, exact=name in _EXACT)


def _of_model(estimates: Estimates, model: str) -> Estimates:
    own = pl.col("model") == model
    runs = estimates.records.runs.filter(own)
    evaluations = estimates.records.evaluations.join(runs, on="run_id", how="semi", maintain_order="left")
    frames = {name: getattr(estimates, name).filter(own) for name, columns in TABLES.items() if "model" in columns}
    return dataclasses.replace(
        estimates, records=dataclasses.replace(estimates.records, runs=runs, evaluations=evaluations), **frames
    )


def _provenance(estimates: Estimates) -> list[tuple[str, str]]:
    """Return what the runs have in common, and the values of what differs between them."""
    runs = estimates.records.runs
    facts = [
        (f"{name.replace('_', ' ')}", _values(runs[name])) for name in _PROVENANCE if not runs[name].is_null().all()
    ]
    seconds = float(runs["train_seconds"].sum())
    shares = cpu_shares(estimates.records)["cpu_share"]
    busy = [] if shares.is_empty() else [("CPU share of a run's threads", _share_range(shares))]
    return [("runs", str(runs.height)), ("training time of all runs", fmt.seconds(seconds)), *busy, *facts]


def _share_range(shares: pl.Series) -> str:
    lowest, median, highest = (shares.quantile(part, "linear") or 0.0 for part in (0, 0.5, 1))
    return f"{lowest:.0%} to {highest:.0%}, median {median:.0%}"


def _values(column: pl.Series) -> str:
    write = fmt.column_writer(column.name)
    return ", ".join(fmt.MISSING if value is None else write(value) for value in column.unique().sort(nulls_last=True))


def _problems(estimates: Estimates) -> dict[str, Any]:
    """Return the runs that did not finish as planned, and how many of the manifest left no record."""
    runs, manifest = estimates.records.runs, estimates.records.manifest
    unfinished = runs.filter(pl.col("status") != "finished").select(_PROBLEM_COLUMNS)
    missing = sorted({run.run_id for run in manifest.runs} - set(runs["run_id"]))
    return {
        "table": html_table("runs", "Runs that diverged or have not finished.", unfinished, RUNS, exact=True),
        "missing": missing,
        "planned": len({run.run_id for run in manifest.runs}),
    }


def _agreement_words(agreement: pl.DataFrame, reference: Path | None) -> str:
    """Say in a sentence how many numbers agree with the reference."""
    if agreement.is_empty() and reference is None:
        return "There is no reference to compare this sweep with."
    name = "the reference" if reference is None else f"the reference {reference.name}"
    if agreement.is_empty():
        return f"Nothing can be compared with {name}: no optimizer, batch and target are in both under the same names."
    said = agreement["agrees"].drop_nulls()
    unsaid = agreement.height - len(said)
    left = f"; of {unsaid} more it cannot be said, for the reason given" if unsaid else ""
    agree = "number agrees" if len(said) == 1 else "numbers agree"
    return f"{said.sum()} of {len(said)} {agree} with {name} within the combined intervals{left}."
