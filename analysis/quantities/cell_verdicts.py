"""What stands against the T of a cell, in words: why it has none, and what to know before it is read."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from analysis import format as fmt
from analysis.quantities.learning_rates import Setting
from analysis.statistics.noise import NO_NOISE
from analysis.verdicts import Finding

#: A target reached within fewer multiples of the warmup says more about the warmup than about the batch.
MIN_WARMUPS_TO_TARGET = 5

#: Fresh seeds ran at a rate chosen for one target; at another, a rate of the grid that is better by more is named.
MAX_EXCESS_TOKENS = 0.05

#: A correction for the luck of the choice by a smaller share of T goes without saying.
MIN_LUCK = 0.005

Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """The setting of a cell and `used`, the group of runs there; None where no run of the cell reached the target.

    groups: all groups of the cell, rows of `run_groups.RunGroups.frame`; rates: those of the grid, `ranked`.
    fresh: the runs used are seeds that took no part in the choice. optimum: the best rate with its interval.
    """

    batch: int
    groups: list[Row]
    rates: list[Row]
    setting: Setting | None
    used: Row | None
    fresh: bool
    optimum: tuple[float | None, float | None, float | None]
    lr_verdict: str

    @property
    def rates_tried(self) -> list[float]:
        return rates_tried(self.groups, self.setting)


def rates_tried(groups: Iterable[Row], setting: Setting | None) -> list[float]:
    """Return the learning rates that were run with the further settings that were chosen."""
    alike = (group["peak_lr"] for group in groups if setting is None or group["tuning"] == setting.tuning)
    return sorted(set(alike) - {None})


def why_no_tokens(choice: Choice, runs: pl.DataFrame) -> Finding | None:
    """Say why a cell of `runs` has no T; None where it has one.

    A setting at which all runs were at the target too early may be better than any other: fresh seeds alone, which
    were chosen without it, then have a T.
    """
    reported = [choice.used] if choice.fresh and choice.used else choice.rates
    early = sum(row["num_runs"] for row in reported if row["num_reached_at_first_eval"] == row["num_runs"])
    if early:
        words = f"{fmt.count(early, 'run')} at the target at the first evaluation: it needs earlier marks"
        return Finding("reached_at_first_eval", words)
    if choice.used is None or choice.used["num_reached"] == 0:
        short = _shortfall(choice.used) if choice.used else "no run that reached the target can be used"
        return why_unreached(runs) or Finding("censored", short)
    return _why_unusable(choice.used)


def _why_unusable(used: Row) -> Finding | None:
    if used["num_diverged"]:
        words = f"{used['num_diverged']} of {fmt.count(used['num_runs'], 'run')} at the chosen rate diverged"
        return Finding("diverged", f"{words}: the others alone would flatter it")
    if used["num_bounds"] < used["num_runs"] - used["num_reached"]:
        return Finding("censored", f"{_shortfall(used)}, after nobody knows how many tokens")
    if used["likely_log_tokens"] is None:
        return Finding("censored", f"{_shortfall(used)}, and too few repeated runs say how much T varies")
    return None


def why_unreached(runs: pl.DataFrame) -> Finding | None:
    """Say why runs of which none reached the target, `targets` rows, have no T; None where one did."""
    if runs["status"].str.starts_with("reached").any():
        return None
    if (runs["status"] == "diverged").all():
        return Finding("diverged", "the only run diverged" if runs.height == 1 else f"all {runs.height} runs diverged")
    return Finding("not_reached", f"target not reached{lowest_seen(runs)}")


def also_diverged(lacking: Finding, counts: Row) -> Iterator[Finding]:
    """Count the runs that diverged in a cell that has no T for another reason."""
    if counts["num_diverged"] and lacking.name != "diverged":
        yield Finding("ok", f"{counts['num_diverged']} of {fmt.count(counts['num_runs'], 'run')} diverged")


def lowest_seen(runs: pl.DataFrame) -> str:
    """Say how low the runs came, `targets` rows; nothing where no loss was finite."""
    lowest = runs["lowest_loss_nats"].min()
    return f": the lowest loss seen was {lowest:.3f}" if isinstance(lowest, float) else ""


def caveats(choice: Choice, protocol: str, luck: float, has_interval: bool) -> Iterator[Finding]:
    """Say what to know of the T of a cell; `luck` is what the choice of the setting made log T too low by."""
    used = choice.used
    assert used is not None
    if protocol == "mid_schedule":
        words = "read while the learning rate decays: T is biased towards runs near their end"
        yield Finding("mid_schedule", words)
    warmups = used["warmups_to_target"]
    if warmups is not None and warmups < MIN_WARMUPS_TO_TARGET:
        words = (
            f"reached after {warmups:.1f} warmups of tokens, and below {MIN_WARMUPS_TO_TARGET} the warmup decides it"
        )
        yield Finding("warmup_confounded", words)
    if used["num_bounds"]:
        words = f"{_shortfall(used)}: T is the most likely one, log-normal, with the spread of all repeated runs"
        yield Finding("censored", words)
    if choice.lr_verdict == "edge_of_grid":
        words = "the best learning rate lies outside those tried: T is an upper bound"
        yield Finding("edge_of_grid", words)
    if choice.lr_verdict == "single_rate" and choice.rates_tried:
        yield Finding("single_rate", "only one learning rate was tried")
    yield Finding("ok", rate_reservations(choice))
    yield Finding("ok", _diverged_elsewhere(choice))
    if luck > MIN_LUCK:
        yield Finding("ok", f"no fresh seeds: T is raised by {luck:.1%} for the luck of the chosen rate")
    if not has_interval:
        yield Finding("few_points", NO_NOISE)


def rate_reservations(choice: Choice) -> str:
    """Say what the grid leaves open about a rate that nothing proves wrong."""
    return "; ".join(words for words in (_untried(choice), _better_setting(choice)) if words)


def _shortfall(used: Row) -> str:
    parts = {"fell short": used["num_short"], "were at the target too early": used["num_reached_at_first_eval"]}
    runs = f"{fmt.count(used['num_runs'], 'run')} at the chosen rate"
    return " and ".join(f"{number} of {runs} {what}" for what, number in parts.items() if number)


def _untried(choice: Choice) -> str:
    assert choice.setting is not None
    tried, rate = choice.rates_tried, choice.setting.peak_lr
    if rate is None:
        return "learning rate not stated"
    place = rate if choice.optimum[0] is None else choice.optimum[0]
    open_ended = choice.lr_verdict == "not_identified" and not min(tried) < place < max(tried)
    return "the best learning rate may lie outside those tried" if open_ended else ""


def _better_setting(choice: Choice) -> str:
    """Name the setting of the grid that the runs should have had at this target, if it matters."""
    rates = (row for row in choice.rates if row["competes"] and row["value"] is not None)
    values = {Setting(row["peak_lr"], row["tuning"]): row["value"] for row in rates}
    if choice.setting not in values:
        return ""
    best = min(values, key=lambda setting: values[setting])
    saved = -math.expm1(values[best] - values[choice.setting])
    return f"{_named(best)} takes {saved:.0%} fewer tokens in the grid's fit" if saved > MAX_EXCESS_TOKENS else ""


def _named(setting: Setting) -> str:
    rate = "" if setting.peak_lr is None else f"learning rate {setting.peak_lr:.3g}"
    return ", ".join(part for part in (rate, setting.tuning) if part)


def _diverged_elsewhere(choice: Choice) -> str:
    lost = {Setting(row["peak_lr"], row["tuning"]): row["num_diverged"] for row in choice.groups if row["num_diverged"]}
    if not lost:
        return ""
    runs = fmt.count(sum(row["num_runs"] for row in choice.groups), "run")
    return f"{sum(lost.values())} of {runs} diverged, at {fmt.listed([_named(setting) for setting in lost])}"
