"""The verbs that read: fit, compare, frontier, schema, and the report of outside tables. Heavy imports stay inside."""

import argparse
import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.arguments import count, definitions, number, share
from analysis.vocabulary import DEFINITIONS, LOSSES, RESIDUALS, TABLE_SUFFIXES

if TYPE_CHECKING:
    from pydantic import BaseModel

    from analysis.estimate import EstimateOptions, Estimates


def add_verbs(verbs: Any) -> None:
    """Add the verbs to `verbs`, what `ArgumentParser.add_subparsers` returned."""
    inputs = input_options()
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON (its schema: critbatch schema)")
    verb = verbs.add_parser(
        "fit", parents=[inputs, as_json], help="tokens to a loss, critical batches, token ratios and laws"
    )
    verb.add_argument(
        "--definition", metavar="D", action="extend", type=definitions, dest="definitions", default=None,
        help=f"of the critical batch; repeatable, or joined by commas (default: all): {', '.join(DEFINITIONS)}",
    )  # fmt: skip
    verb.set_defaults(verb=fit)
    verb = verbs.add_parser("compare", parents=[inputs, as_json], help="optimizers at equal token budgets")
    verb.set_defaults(verb=compare)
    verb = verbs.add_parser("frontier", parents=[inputs, as_json], help="time against cost to a loss, over devices")
    _add_cost_options(verb)
    verb.set_defaults(verb=frontier)
    verb = verbs.add_parser("schema", help="print the JSON Schema of what --json prints")
    verb.set_defaults(verb=schema)


def input_options() -> argparse.ArgumentParser:
    """Return a parent parser: what is read, how its columns are named and measured, and how it is fitted."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="folders of sweeps, or tables: .csv, .jsonl or .parquet"
    )
    parser.add_argument("--results", metavar="DIR", default="results", help="where sweeps have their folders")
    tables = parser.add_argument_group("outside tables")
    tables.add_argument("--rename", metavar="THEIRS=OURS", action="append", default=[], help="a column; repeatable")
    tables.add_argument("--batch-in", choices=["tokens", "sequences"], default="tokens", help="unit of the batch")
    tables.add_argument(
        "--tokens-in",
        choices=["tokens", "sequences", "steps"],
        default="tokens",
        help="unit of tokens seen and budgets",
    )
    tables.add_argument("--loss-in", choices=["nats", "bits"], default="nats", help="unit of losses, per token")
    tables.add_argument("--sequence-length", metavar="N", type=count, help="tokens of a sequence")
    fits = parser.add_argument_group("estimates")
    fits.add_argument("--baseline", metavar="NAME", help="optimizer compared with (default: the sweep's, or adamw)")
    fits.add_argument(
        "--target-loss", metavar="L", type=number, action="append", default=[], dest="targets",
        help="nats per token, to be reached; repeatable (default: the sweep's, or chosen from the curves)",
    )  # fmt: skip
    fits.add_argument("--level", metavar="P", type=share, default=0.9, help="of the intervals (default: 0.9)")
    fits.add_argument(
        "--reference-batch-tokens", metavar="N", type=count,
        help="of overhead_20pct (default for a sweep: the smallest batch that all optimizers share)",
    )  # fmt: skip
    fits.add_argument("--residuals", choices=RESIDUALS, default="log", help="what least squares compares")
    fits.add_argument("--loss", choices=LOSSES, default="squares", help="all but squares resist outliers")
    return parser


def fit(options: argparse.Namespace) -> int:
    """Print tokens to the targets, critical batches, token ratios and laws."""
    if options.json and options.definitions is None:
        options.definitions = DEFINITIONS  # tables for people leave out what needs more than T(B), unless asked for
    return _answer(options, "tokens", "fit")


def compare(options: argparse.Namespace) -> int:
    """Print how the optimizers compare at equal token budgets."""
    return _answer(options, "budgets", "compare")


def frontier(options: argparse.Namespace) -> int:
    """Print time and cost to the targets, over device counts."""
    return _answer(options, "time", "frontier")


def schema(options: argparse.Namespace) -> int:
    """Print the JSON Schemas of the answers."""
    del options
    from analysis.contract import json_schema

    print(json.dumps(json_schema(), indent=1))
    return 0


def report(options: argparse.Namespace, folder: Path) -> Path:
    """Write the report of outside tables, or of several sweeps together, into `folder`; return its place."""
    estimated = _estimates(options)
    from analysis.page.report import write_report

    return write_report(estimated, folder)


def is_table(path: str) -> bool:
    """Tell whether a path names a table, not a sweep."""
    return Path(path).suffix.lower() in TABLE_SUFFIXES


def keep_to_one_thread() -> None:
    """Keep linear algebra to one thread: on small matrices threads wait for each other. To be called before numpy is
    imported.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _answer(options: argparse.Namespace, question: str, name: str) -> int:
    """Print the answer of a verb, by its name in `answers` and `page.printed`."""
    estimated = _estimates(options, question)
    if options.json:
        from analysis import answers

        answer: BaseModel = getattr(answers, f"{name}_answer")(estimated, estimated.records.notes)
        print(json.dumps(answer.model_dump(mode="json"), indent=1, allow_nan=False))
        return 0
    from rich.console import Console

    from analysis.page import printed

    console = Console(width=None if sys.stdout.isatty() else 160)  # a file or a pipe has no width of its own
    for part in getattr(printed, f"{name}_lines")(estimated):
        console.print(part, markup=False, highlight=False)
    return 0


def estimate_options(options: argparse.Namespace) -> "EstimateOptions":
    """Return what the command line says of the estimates."""
    from analysis.estimate import EstimateOptions

    return EstimateOptions(
        level=options.level,
        reference_batch_tokens=options.reference_batch_tokens,
        definitions=getattr(options, "definitions", None),
        residuals=options.residuals,
        loss=options.loss,
    )


def _estimates(options: argparse.Namespace, *questions: str) -> "Estimates":
    """Return the estimates of what was named; of some questions alone where there are any."""
    keep_to_one_thread()
    gc.set_threshold(100_000)  # what is imported lives to the end: to look through it on the way takes .1 s
    from analysis.estimate import QUESTIONS, estimate
    from analysis.inputs.load import read
    from analysis.inputs.tables import TableOptions
    from analysis.inputs.timings import read_timings

    tables = TableOptions(
        sequence_length=options.sequence_length,
        batch_in=options.batch_in,
        tokens_in=options.tokens_in,
        loss_in=options.loss_in,
        renames=dict(_renaming(text) for text in options.rename),
    )
    paths = [_place(Path(path), Path(options.results)) for path in options.paths]
    records = read(paths, tables, options.baseline, tuple(options.targets))
    timings = read_timings(paths[0]) if len(paths) == 1 and not records.outside else None
    chosen = replace(_with_costs(estimate_options(options), options), questions=questions or QUESTIONS)
    return estimate(records, chosen, timings=timings)


def _with_costs(chosen: "EstimateOptions", options: argparse.Namespace) -> "EstimateOptions":
    """Add the options of `critbatch frontier`, if this is it."""
    if options.verb is not frontier:
        return chosen
    given = {
        "bandwidth_bytes_per_second": options.bandwidth,
        "latency_seconds": options.latency,
        "max_devices": options.max_devices,
        "optimizer_sharing": options.optimizer_sharing,
    }
    costs = replace(chosen.costs, **{name: value for name, value in given.items() if value is not None})
    return replace(chosen, costs=costs, budgets=tuple(options.budget), deadlines=tuple(options.deadline))


def _place(path: Path, results: Path) -> Path:
    """Return what was named: a path, or else the folder under the results that a sweep of this name has."""
    named = results / path
    return named if not path.exists() and (named / "sweep.json").is_file() else path


def _renaming(text: str) -> tuple[str, str]:
    theirs, equals, ours = text.partition("=")
    if not (theirs and equals and ours):
        raise ValueError(f"--rename {text}: expected THEIRS=OURS, as --rename lr=peak_lr")
    return theirs, ours


def _add_cost_options(verb: argparse.ArgumentParser) -> None:
    costs = verb.add_argument_group("cost model")
    costs.add_argument("--bandwidth", metavar="X", type=number, help="bytes per second between devices")
    costs.add_argument("--latency", metavar="S", type=number, help="seconds for each doubling of the devices")
    costs.add_argument("--max-devices", metavar="N", type=count, help="largest device count projected")
    costs.add_argument(
        "--optimizer-sharing", choices=["replicated", "shared"], help="whether each device does all of its matrix work"
    )
    costs.add_argument("--budget", metavar="S", type=number, action="append", default=[], help="device-seconds")
    costs.add_argument("--deadline", metavar="S", type=number, action="append", default=[], help="seconds")
