import re
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.page import captions, plots
from analysis.page.drawn import inline_svg
from analysis.page.html_table import html_table
from analysis.page.report import write_report
from analysis.schemas import RUNS, TABLES, polars_schema
from tests.report_tables import complete, with_columns, with_rivals
from tests.synthetic import Laboratory, plan, records

LAB = Laboratory(targets=(2.2, 2.1, 2.0))

#: All that a table of final losses has to say of a run.
KEYS = ("run_id", "model", "optimizer", "global_batch_tokens", "token_budget", "protocol", "stage", "status", "tuning")
RUN_TYPES = polars_schema(RUNS)


@pytest.fixture(scope="module")
def estimates():
    return with_rivals(complete(estimate(records(LAB), reference=records(replace(LAB, draw=1)))))


@pytest.fixture(scope="module")
def folder(estimates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(estimates, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {})


def test_report_writes_a_page_all_figures_and_all_tables(folder):
    assert {path.stem for path in (folder / "figures").glob("*.svg")} == set(plots.FIGURES)
    assert {path.stem for path in (folder / "figures").glob("*.png")} == set(plots.FIGURES)
    assert {path.stem for path in (folder / "tables").glob("*.csv")} == {*TABLES, "runs", "evaluations", "diagnostics"}
    assert not list(folder.rglob(".*"))


def test_report_is_byte_identical_for_equal_estimates(estimates, folder, tmp_path):
    write_report(estimates, tmp_path)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path


def test_page_loads_nothing_from_elsewhere(page):
    assert not re.findall(r'(?:src|href)="(?!#|figures/|tables/)[^"]*"', page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(http" not in page


def test_page_has_no_id_twice_and_every_reference_has_its_id(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_page_links_only_to_files_that_are_there(page, folder):
    links = re.findall(r'href="((?:figures|tables)/[^"]+)"', page)
    assert links
    assert all((folder / link).exists() for link in links)


def test_tables_hold_every_digit(estimates, folder):
    cells = pl.read_csv(folder / "tables" / "cells.csv", schema=estimates.cells.schema)
    assert cells.select(pl.exclude("explanation")).equals(estimates.cells.select(pl.exclude("explanation")))


def test_page_shows_the_estimates_it_was_given(page):
    assert "To a validation loss of 2.0 nats per token" in page
    assert "needs fewer tokens than AdamW" in page
    assert "numbers agree with the reference" in page


def test_inline_svg_prefixes_ids_and_references_alike():
    content = '<g id="a" clip-path="url(#c)"/><use xlink:href="#a"/>'
    svg = f'<?xml version="1.0"?><svg width="10pt" height="5pt" viewBox="0 0 10 5">{content}</svg>'.encode()
    text = inline_svg(svg, "f", "A <figure>")
    assert 'id="f-a"' in text
    assert "url(#f-c)" in text
    assert 'href="#f-a"' in text
    assert text.startswith("<svg")
    assert "A &lt;figure&gt;" in text
    assert 'height="5pt"' not in text


def test_a_failing_figure_leaves_the_old_page_whole(estimates, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("the old page")

    def fails(_):
        raise RuntimeError

    monkeypatch.setattr(plots, "FIGURES", {"headline": fails})
    with pytest.raises(RuntimeError):
        write_report(estimates, tmp_path)
    assert (tmp_path / "report.html").read_text() == "the old page"


@pytest.mark.usefixtures("no_figures")
def test_page_escapes_what_a_user_wrote(estimates, tmp_path):
    manifest = estimates.records.manifest.model_copy(update={"description": "<script>alert(1)</script>"})
    named = replace(estimates, records=replace(estimates.records, manifest=manifest))
    assert "<script" not in write_report(named, tmp_path).read_text()


@pytest.mark.usefixtures("no_figures")
def test_page_names_runs_that_diverged_or_never_started(tmp_path):
    runs = plan(LAB)
    present = [replace(runs[0], status="diverged"), *runs[2:]]
    whole = records(LAB, runs)
    partial = replace(records(LAB, present), manifest=whole.manifest)
    page = write_report(estimate(partial), tmp_path).read_text()
    listed = page[page.index('id="problems"') : page.index("<h3>Tables</h3>")]
    assert runs[0].run_id in listed
    assert runs[1].run_id in listed
    assert runs[2].run_id not in listed


@pytest.mark.usefixtures("no_figures")
def test_page_without_a_reference_says_so(tmp_path):
    assert "no reference" in write_report(estimate(records(LAB)), tmp_path).read_text()


def test_models_are_drawn_apart_and_laws_over_all_of_them(estimates, tmp_path, monkeypatch):
    larger = with_columns(estimates.records.runs, model="larger").with_columns(run_id=pl.format("larger-{}", "run_id"))
    both = replace(estimates.records, runs=pl.concat([estimates.records.runs, larger]))
    budgets = pl.concat([estimates.equal_budget, with_columns(estimates.equal_budget, model="larger")])
    figures = {name: plots.FIGURES[name] for name in ("equal_budget", "laws")}
    monkeypatch.setattr(plots, "FIGURES", figures)
    page = write_report(replace(estimates, records=both, equal_budget=budgets), tmp_path).read_text()
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {
        "equal_budget-lab.svg",
        "equal_budget-larger.svg",
        "laws.svg",
    }
    assert "<h3>Model lab</h3>" in page
    assert "Loss at equal tokens, model larger" in page


def test_page_puts_the_lead_before_the_headline_figure_and_folds_the_easier_targets(page):
    marks = [
        'class="lead"',
        "The token ratio is",
        'id="figure-headline"',
        "<h3>To a validation loss of 2.0",
        "<summary>To 2.1",
    ]
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)
    assert page.count('id="figure-headline"') == 1


def test_reasons_stand_once_below_their_table(estimates):
    frame = with_columns(estimates.critical_batches, verdict="misfit", explanation="a long reason")
    made = html_table("critical_batches", "", frame, TABLES["critical_batches"])
    assert made.notes == ["¹ a long reason"]
    assert "reasons" not in made.header
    assert made.header.index("verdict") < made.header.index("critical batch tokens")
    verdicts = {row[made.header.index("verdict")] for row in made.rows}
    assert verdicts == {"the curve misses the points¹"}
    assert not any("a long reason" in cell for row in made.rows for cell in row)


def test_tables_of_runs_write_integers_in_full(estimates):
    made = html_table("runs", "", estimates.records.runs.select("run_id", "warmup_tokens"), RUNS, exact=True)
    assert {row[1] for row in made.rows} == {"16384"}


@pytest.mark.usefixtures("no_figures")
def test_page_with_a_reference_of_other_names_does_not_say_that_there_is_none(tmp_path):
    other = replace(LAB, optimizers={"lion": LAB.optimizers["muon"]})
    page = write_report(
        estimate(records(LAB), reference=records(other)), tmp_path / "new", tmp_path / "old"
    ).read_text()
    assert "no reference" not in page
    assert "Nothing can be compared with the reference old" in page


@pytest.mark.usefixtures("no_figures")
def test_provenance_says_how_busy_the_machine_was(estimates, tmp_path):
    made = estimates.records
    clocked = replace(
        made,
        runs=made.runs.with_columns(threads=pl.lit(2)),
        evaluations=made.evaluations.with_columns(train_cpu_seconds=pl.col("train_seconds") * 1.22),
    )
    assert "61% to 61%, median 61%" in write_report(replace(estimates, records=clocked), tmp_path).read_text()


@pytest.mark.usefixtures("no_figures")
def test_provenance_names_the_machine_and_the_code_as_recorded(estimates, tmp_path):
    recorded = {
        "host": "node7",
        "driver": "570.1",
        "lock_hash": "1f2e",
        "code_snapshot": "ab12",
        "code_commit": "c0ffee+",
    }
    runs = with_columns(estimates.records.runs, **recorded)
    made = replace(estimates, records=replace(estimates.records, runs=runs))
    page = write_report(made, tmp_path).read_text()
    for name, value in recorded.items():
        assert f'<th scope="row">{name.replace("_", " ")}</th><td class="long">{value}</td>' in page
    assert "cuda version" not in page  # that of a processor is null


def test_importing_the_report_loads_no_plotting_library_and_no_torch():
    code = "import sys, analysis.page.report; print({'seaborn', 'matplotlib', 'jinja2', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_sections_stand_in_the_order_of_reading_and_warnings_before_the_definitions(page):
    order = ["answer", "inputs", *(section.anchor for section in captions.SECTIONS), "warnings", "definitions"]
    places = [page.index(f'<section id="{anchor}"') for anchor in order]
    assert places == sorted(places)


def test_every_figure_names_the_tables_that_it_was_drawn_from(page):
    for name, caption in captions.FIGURES.items():
        figure = page[page.index(f'<figure id="figure-{name}">') :].partition("</figure>")[0]
        assert all(f'href="tables/{table}.csv"' in figure for table in caption.tables), name


def test_what_is_absent_is_said_in_words_and_leaves_no_file_of_an_earlier_report(estimates, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FIGURES", {"gaps": plots.FIGURES["gaps"]})
    write_report(estimates, tmp_path)
    assert (tmp_path / "figures" / "gaps.svg").exists()
    page = write_report(replace(estimates, gaps=estimates.gaps.clear()), tmp_path).read_text()
    assert not list((tmp_path / "figures").iterdir())
    assert "No gaps of final loss" in page
    assert "No rows: it takes final losses of the baseline and of another optimizer" in page


def test_page_of_finals_compares_losses_and_says_that_no_tokens_can_be_told(estimates, tmp_path):
    """As of an outside table: no curve, no device, no seconds, no rates."""
    kept = {"runs", "gaps", "iso_loss", "speedups", "equal_budget", "tuning"}
    empty = {name: getattr(estimates, name).clear() for name in TABLES if name not in kept}
    nulls = [name for name in RUNS if name not in KEYS]
    runs = estimates.records.runs.with_columns(pl.lit(None, RUN_TYPES[name]).alias(name) for name in nulls)
    manifest = estimates.records.manifest.model_copy(update={"targets_nats": ()})
    curves, measured = estimates.records.evaluations.clear(), estimates.records.diagnostics.clear()
    bare = replace(estimates.records, manifest=manifest, runs=runs, evaluations=curves, diagnostics=measured)
    page = write_report(replace(estimates, records=bare, **empty), tmp_path).read_text()
    assert "No tokens to a target loss can be told from what the runs recorded." in page
    assert "Muon&#39;s loss is lower than AdamW&#39;s" in page
    assert "No loss curves" in page
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == {"coverage", "equal_budget", "gaps"}


def test_page_of_a_table_of_targets_has_no_runs(estimates, tmp_path):
    given = estimates.targets.filter(target_loss_nats=2.0).with_columns(
        pl.lit(None, estimates.targets.schema[name]).alias(name)
        for name in ("peak_lr", "warmup_tokens", "num_devices", "train_seconds_to_target", "flops_to_target")
    )
    records_ = estimates.records
    bare = replace(records_, runs=records_.runs.clear(), evaluations=records_.evaluations.clear(), given=given)
    cells = estimates.cells.with_columns(
        best_lr=pl.lit(None, pl.Float64), optimal_lr=pl.lit(None, pl.Float64), lr_verdict=pl.lit("single_rate")
    )
    none = {name: getattr(estimates, name).clear() for name in ("frontier", "dominance", "choices", "equal_budget")}
    rates = estimates.rates.with_columns(peak_lr=pl.lit(None, pl.Float64))
    made = replace(estimates, records=bare, cells=cells, rates=rates, targets=given, **none)
    page = write_report(made, tmp_path).read_text()
    assert "No learning rates: the runs record none." in page
    assert "tokens to targets as given" in page
    assert {"headline", "tokens_to_target", "critical_batches"} <= {
        p.stem for p in (tmp_path / "figures").glob("*.svg")
    }
