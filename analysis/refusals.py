"""What a question could not be answered for, and why: said by `critbatch fit`, `compare` and `frontier` alike."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.verdicts import findings_of

#: What two optimizers must share to be compared, and how several of them are called.
_OF_TOKENS = {"model": "model", "protocol": "protocol", "target_loss_nats": "target loss"}
_OF_BUDGETS = {"model": "model", "protocol": "protocol"}


class Refusal(NamedTuple):
    """What was asked for and is not answered, and the reason in words."""

    what: str
    reason: str


def of_fit(estimates: Estimates) -> list[Refusal]:
    """Return what `critbatch fit` cannot tell: no tokens to a target, no pair, a definition without its input."""
    cells = estimates.cells
    nothing = "" if cells["tokens_to_target"].count() else _no_tokens(estimates)
    return _each_once(
        [
            *_said("tokens_to_target", nothing),
            *_refused("tokens_to_target", cells),
            *_refused_definitions(estimates.critical_batches),
            *_no_pair("token_ratio", estimates, cells, _OF_TOKENS),
            *_refused("token_ratio", estimates.token_ratios),
            *_refused("ratio_trend", estimates.ratio_trends),
            *_refused("ratio_decomposition", estimates.ratio_decomposition),
            *_refused("laws", estimates.laws),
        ]
    )


def of_compare(estimates: Estimates) -> list[Refusal]:
    """Return what `critbatch compare` cannot tell: no loss at the end of a budget, no pair, no law."""
    finals = estimates.final_losses
    nothing = "" if finals["final_loss_nats"].count() else _no_final_loss(estimates)
    return _each_once(
        [
            *_said("final_loss", nothing),
            *_no_pair("gap", estimates, finals, _OF_BUDGETS),
            *_refused("gap", estimates.gaps),
            *_refused("iso_loss_batch", estimates.iso_loss),
            *_refused("speedup", estimates.speedups),
        ]
    )


def of_frontier(estimates: Estimates) -> list[Refusal]:
    """Return what `critbatch frontier` cannot tell: no seconds, no run at a target, no pair."""
    nothing = "" if estimates.frontier.height else _no_point(estimates)
    return _each_once(
        [
            *_said("frontier", nothing),
            *_no_pair("dominance", estimates, estimates.cells, _OF_TOKENS),
            *_refused("dominance", estimates.dominance),
            *_refused("choices", estimates.choices),
        ]
    )


def _each_once(refusals: Sequence[Refusal]) -> list[Refusal]:
    return list(dict.fromkeys(refusals))


def _said(what: str, reason: str) -> list[Refusal]:
    return [Refusal(what, reason)] if reason else []


def _refused(what: str, frame: pl.DataFrame) -> Iterator[Refusal]:
    """Yield the refusals among the rows of a table: of all that stands against a row, those words alone."""
    refused = frame.filter(pl.col("verdict") == "refused").select("reasons", "explanation")
    for row in refused.unique(maintain_order=True).iter_rows():
        yield from (Refusal(what, words) for name, words in findings_of(*row) if name == "refused")


def _refused_definitions(frame: pl.DataFrame) -> Iterator[Refusal]:
    for (definition,), rows in frame.group_by(["definition"], maintain_order=True):
        yield from _refused(f"critical_batch {definition}", rows)


def _all_diverged(estimates: Estimates) -> str:
    runs = estimates.records.runs
    if runs.is_empty() or (runs["status"] != "diverged").any():
        return ""
    return "the only run diverged" if runs.height == 1 else f"all {runs.height} runs diverged"


def _no_tokens(estimates: Estimates) -> str:
    if diverged := _all_diverged(estimates):
        return diverged
    if estimates.cells.height:
        return "" if (estimates.cells["verdict"] == "refused").any() else "no cell has tokens to a target"
    if estimates.records.manifest.targets_nats:
        return "no run has a curve along which a target loss could be crossed"
    return "no target loss: none was asked for, and none could be chosen from the curves"


def _no_final_loss(estimates: Estimates) -> str:
    if diverged := _all_diverged(estimates):
        return diverged
    if estimates.records.evaluations.is_empty():
        return "a table of targets has no loss at the end of a token budget: it takes curves or finals"
    return "no loss at the end of a budget: every run compared stopped early, or still runs"


def _no_point(estimates: Estimates) -> str:
    if diverged := _all_diverged(estimates):
        return diverged
    if not estimates.cells["tokens_to_target"].count():
        return "no cell has tokens to a target"
    return "no point: the input has no seconds for the runs that reached a target"


def _no_pair(what: str, estimates: Estimates, frame: pl.DataFrame, shared: dict[str, str]) -> Iterator[Refusal]:
    """Yield why the baseline is compared with no other optimizer, or not with some of them."""
    names = estimates.records.runs["optimizer"].unique().sort().to_list()
    if len(names) == 1:
        yield Refusal(what, f"{names[0]} is the only optimizer: there is nothing to compare with")
    baseline = estimates.records.manifest.baseline
    ours = frame.filter(optimizer=baseline)
    for name in frame["optimizer"].unique().sort() if ours.height else []:
        theirs = frame.filter(optimizer=name)
        if ours.join(theirs, on=list(shared), how="semi").is_empty():
            yield Refusal(what, f"{fmt.listed([baseline, name])} share no {_lacking(ours, theirs, shared)}")


def _lacking(ours: pl.DataFrame, theirs: pl.DataFrame, shared: dict[str, str]) -> str:
    """Name the first column in which two frames have nothing in common, with the values of both."""
    for column, noun in shared.items():
        values = [frame[column].unique().sort().to_list() for frame in (ours, theirs)]
        if not set(values[0]) & set(values[1]):
            write = fmt.column_writer(column)
            return f"{noun}: {fmt.listed([', '.join(map(write, own)) for own in values])}"
    return f"{fmt.listed(list(shared.values()))} together"
