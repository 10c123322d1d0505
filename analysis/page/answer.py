"""The answer in words: a lead, and one table and a few sentences for each target, made from frames."""

from dataclasses import dataclass

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page import sentences as say
from analysis.page.budget_sentences import budget_sentences
from analysis.page.sentences import AtTarget, Row, at_target
from analysis.quantities.cells import lowest_seen

_CRITICAL_BATCH = (
    "The critical batch is the batch size at which twice the least tokens are spent: far below it a larger batch costs "
    "next to no tokens, far above it it saves next to no steps."
)
_TOKEN_RATIO = (
    "The token ratio is the tokens that {} takes over those that the other optimizer takes, to the same loss at the "
    "same batch size. "
)
#: Of more challengers the lead gives the tokens alone.
_MAX_IN_FULL = 3


@dataclass(frozen=True)
class Answer:
    """What one model's runs say about one target: a small table and sentences."""

    target_loss_nats: float
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    sentences: list[str]


def answers(estimates: Estimates) -> list[Answer]:
    """Answer for every target of one model: that of the headline, then the others, the hardest first."""
    targets, headline = sorted(estimates.cells["target_loss_nats"].unique()), headline_target(estimates)
    ordered = sorted(targets, key=lambda loss: loss != headline)
    return [_answer(at_target(estimates, target), target) for target in ordered]


def lead(estimates: Estimates) -> str:
    """Answer for the headline's target in one paragraph; where there is none, say why, and compare final losses."""
    target = headline_target(estimates)
    if target is None:
        return " ".join([_nothing_reached(estimates), *budget_sentences(estimates)])
    found = at_target(estimates, target)
    place = f"To a validation loss of {fmt.loss(target)} nats per token, "
    if not found.others:
        return f"{place}{say.critical_numbers(found, [found.baseline])}"
    sentences = []
    for name in found.others:
        sentences.append(f"{say.tokens_in_short(found, name)}.")
        if len(found.others) > _MAX_IN_FULL:
            continue  # the list below has the rest
        sentences.append(say.critical_numbers(found, [name, found.baseline]))
        sentences.append(say.frontier(found, name))
    return place + " ".join(sentences)


def definition(estimates: Estimates) -> str:
    """Say what the numbers of the lead are."""
    baseline = estimates.records.manifest.baseline
    several = estimates.token_ratios.height > 0
    return (_TOKEN_RATIO.format(fmt.optimizer_name(baseline)) if several else "") + _CRITICAL_BATCH


def _answer(found: AtTarget, target: float) -> Answer:
    ends = list(dict.fromkeys((found.sizes[0], found.sizes[-1]))) if found.others else []
    rows = [
        (
            fmt.optimizer_name(name),
            *_critical_cells(found.criticals.get(name)),
            *("baseline" if name == found.baseline else _ratio_cell(found.ratios_of(name), size) for size in ends),
        )
        for name in (found.baseline, *found.others)
    ]
    sentences = [sentence for name in found.others for sentence in _sentences(found, name) if sentence]
    header = ("Optimizer", "Critical batch (tokens)", "Verdict", *(f"Token ratio at {fmt.tokens(s)}" for s in ends))
    return Answer(target, header, rows, sentences)


def _sentences(found: AtTarget, name: str) -> list[str]:
    known = [row for row in found.ratios_of(name) if row["token_ratio"] is not None]
    return [
        *(say.ratio(known[place]) for place in sorted({0, len(known) - 1}) if known),
        *(say.trend(row) for row in found.trends if row["challenger"] == name),
        say.decomposition(found, name),
        say.critical(found, name),
        say.frontier(found, name),
    ]


def _critical_cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return fmt.MISSING, "not estimated"
    return fmt.estimate(row, "critical_batch_tokens"), fmt.verdict(row["verdict"])


def _ratio_cell(ratios: list[Row], size: int) -> str:
    row = next((row for row in ratios if row["global_batch_tokens"] == size), None)
    if row is None:
        return f"{fmt.MISSING} (not estimated)"
    return fmt.estimate(row, "token_ratio") + ("" if row["verdict"] == "ok" else f" ({fmt.verdict(row['verdict'])})")


def _nothing_reached(estimates: Estimates) -> str:
    targets = [fmt.loss(target) for target in sorted(estimates.records.manifest.targets_nats, reverse=True)]
    if not targets or estimates.targets.is_empty():
        return "No tokens to a target loss can be told from what the runs recorded."
    words = f"target{'s' if len(targets) > 1 else ''}: {fmt.listed(targets)} nats per token"
    if "reached_at_first_eval" in set(estimates.targets["status"]):
        return f"No tokens to a target can be told: runs were there at their first evaluation ({words})."
    return f"No target has been reached by every run of any batch size ({words}){lowest_seen(estimates.targets)}."
