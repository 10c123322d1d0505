"""A report: one self-contained HTML file, and the figures and tables behind it.

Equal estimates give equal files, byte for byte.
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page import captions, provenance
from analysis.page.answer import Answer, answers, definition, lead
from analysis.page.budget_sentences import budget_sentences
from analysis.page.caveats import Caveat, caveats
from analysis.page.definitions import DEFINITIONS
from analysis.page.drawn import DrawnFigure, draw_all
from analysis.page.html_table import HtmlTable, html_table
from analysis.page.parts import Part, parts
from analysis.refusals import of_compare, of_fit, of_frontier
from analysis.schemas import RUNS, TABLES
from harness.record import write_atomically

#: Tables of single runs, whose integers are written in full.
_EXACT = ("runs", "targets")
#: Tables that stand with the inputs, not in a section of figures.
_INPUT_TABLES = ("targets", "runs")


@dataclass(frozen=True)
class Answered:
    """What the page says of one model and protocol: in short, by target, at equal budgets, with which caveats."""

    label: str
    lead: str
    answers: list[Answer]
    at_equal_budgets: list[str]
    caveats: list[Caveat]


def write_report(estimates: Estimates, folder: Path, reference: Path | None = None) -> Path:
    """Write report.html, figures/*.svg and *.png, tables/*.csv into `folder`, each whole or not at all.

    `reference` is the folder that `estimates.agreement` compares with; the report names it.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    for name, frame in frames(estimates).items():
        write_atomically(folder / "tables" / f"{name}.csv", frame.write_csv().encode())
    figures = list(draw_all(estimates, folder / "figures"))
    path = folder / "report.html"
    write_atomically(path, _render(estimates, figures, reference).encode())
    return path


def _render(estimates: Estimates, figures: list[DrawnFigure], reference: Path | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("analysis.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    records = estimates.records
    return environment.get_template("report.html.j2").render(
        manifest=records.manifest,
        notes=records.notes,
        level=f"{estimates.level:.0%}",
        definition=definition(estimates),
        answered=[_answered(part) for part in parts(estimates)],
        refused=_refused(estimates),
        sections=_sections(records.diagnostics),
        figures=figures,
        absent=_absent(figures),
        tables={name: _table(name, frame) for name, frame in frames(estimates).items() if name in captions.NEEDS},
        input_tables=_INPUT_TABLES,
        needs=captions.NEEDS,
        agreement=_table("agreement", estimates.agreement),
        agreement_words=_agreement_words(estimates.agreement, reference),
        definitions=DEFINITIONS,
        facts=provenance.facts(estimates),
        problems=provenance.problems(estimates),
        loss=fmt.loss,
        verdict=fmt.verdict,
    )


def _sections(diagnostics: pl.DataFrame) -> list[captions.Section]:
    return [each for each in captions.SECTIONS if each.anchor != captions.OPTIONAL_SECTION or diagnostics.height]


def _answered(part: Part) -> Answered:
    own = part.estimates
    return Answered(part.label, lead(own), answers(own), budget_sentences(own), caveats(own))


def _refused(estimates: Estimates) -> dict[str, str]:
    """Return the reasons of all refusals, each with what it forbids; a definition that was not asked for is none."""
    by_reason: dict[str, list[str]] = {}
    for refusal in dict.fromkeys((*of_fit(estimates), *of_compare(estimates), *of_frontier(estimates))):
        by_reason.setdefault(refusal.reason, []).append(refusal.what.replace("_", " "))
    return {reason: fmt.listed(whats) for reason, whats in by_reason.items()}


def _absent(figures: list[DrawnFigure]) -> dict[str, list[str]]:
    """Return for each kind of figure why it is absent, with the parts that this is said of where not of all."""
    absent: dict[str, list[str]] = {}
    for kind in {figure.kind: None for figure in figures}:
        own = [figure for figure in figures if figure.kind == kind]
        for words in {figure.words: None for figure in own if figure.words}:
            labels = [figure.label for figure in own if figure.words == words]
            where = "" if len(labels) == len(own) else f" ({'; '.join(labels)})"
            absent.setdefault(kind, []).append(words + where)
    return absent


def frames(estimates: Estimates) -> dict[str, pl.DataFrame]:
    """Return every table by the name of its file."""
    tables = {name: getattr(estimates, name) for name in TABLES}
    records = estimates.records
    tables |= {"runs": records.runs.drop("config_json"), "evaluations": records.evaluations}
    return tables | ({"diagnostics": records.diagnostics} if records.diagnostics.height else {})


def _table(name: str, frame: pl.DataFrame) -> HtmlTable:
    columns = TABLES.get(name, RUNS)
    return html_table(name, captions.TABLES[name], frame, columns, exact=name in _EXACT)


def _agreement_words(agreement: pl.DataFrame, reference: Path | None) -> str:
    """Say in a sentence how many numbers agree with the reference."""
    if agreement.is_empty() and reference is None:
        return "There is no reference to compare with."
    name = "the reference" if reference is None else f"the reference {reference.name}"
    if agreement.is_empty():
        return f"Nothing can be compared with {name}: no optimizer, batch and target are in both under the same names."
    said = agreement["agrees"].drop_nulls()
    unsaid = agreement.height - len(said)
    left = f"; of {unsaid} more it cannot be said, for the reason given" if unsaid else ""
    agree = "number agrees" if len(said) == 1 else "numbers agree"
    return f"{said.sum()} of {len(said)} {agree} with {name} within the combined intervals{left}."
