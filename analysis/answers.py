"""The answers of `critbatch fit`, `compare` and `frontier`, filled from estimates."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from analysis import contract, refusals
from analysis.estimate import Estimates
from analysis.refusals import Refusal
from analysis.verdicts import names_of

Row = Mapping[str, Any]

#: A verdict of a cell that stands in for its T; every other one qualifies a T that is there.
_STATUSES = ("diverged", "not_reached", "reached_at_first_eval", "censored")

_REFUSED = pl.col("verdict") == "refused"


def fit_answer(estimates: Estimates, notes: Sequence[str] = ()) -> contract.Fit:
    """Return tokens to target, critical batches, token ratios and laws, and what was refused."""
    level = estimates.level
    return contract.Fit(
        tokens_to_target=[_tokens_to_target(row, level) for row in _rows(estimates.cells)],
        critical_batch=[_critical_batch(row, level) for row in _rows(estimates.critical_batches)],
        token_ratio=[_token_ratio(row, level) for row in _rows(estimates.token_ratios)],
        ratio_trend=[_ratio_trend(row, level) for row in _rows(estimates.ratio_trends)],
        ratio_decomposition=[_ratio_part(row, level) for row in _rows(estimates.ratio_decomposition)],
        rate_rules=[_rate_rule(row, level) for row in _rows(estimates.rate_rules)],
        loss_laws=[_loss_law(row, level) for row in _rows(estimates.loss_laws)],
        laws=list(_laws(estimates.laws, level)),
        refused=_said(refusals.of_fit(estimates)),
        notes=list(notes),
    )


def compare_answer(estimates: Estimates, notes: Sequence[str] = ()) -> contract.Compare:
    """Return losses, gaps, batches and speedups at equal token budgets, and what was refused."""
    level = estimates.level
    return contract.Compare(
        final_loss=[_final_loss(row, level) for row in _rows(estimates.final_losses)],
        gap=[_gap(row, level) for row in _rows(estimates.gaps)],
        iso_loss_batch=[_iso_loss(row, level) for row in _rows(estimates.iso_loss)],
        speedup=[_speedup(row, level) for row in _rows(estimates.speedups)],
        tuning=[contract.Tuning(**row) for row in estimates.tuning.iter_rows(named=True)],
        refused=_said(refusals.of_compare(estimates)),
        notes=list(notes),
    )


def frontier_answer(estimates: Estimates, notes: Sequence[str] = ()) -> contract.Frontier:
    """Return the points, who dominates whom, the best choices and the cost model."""
    level = estimates.level
    return contract.Frontier(
        points=[_point(row, level) for row in _rows(estimates.frontier)],
        dominance=[_dominance(row, level) for row in _rows(estimates.dominance)],
        choices=[_choice(row) for row in _rows(estimates.choices)],
        cost_model=[contract.Constant(**row) for row in estimates.cost_model.iter_rows(named=True)],
        refused=_said(refusals.of_frontier(estimates)),
        notes=list(notes),
    )


def _rows(frame: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """Return the rows that were not refused."""
    return frame.filter(~_REFUSED).iter_rows(named=True)


def _said(refused: Sequence[Refusal]) -> list[contract.Refused]:
    return [contract.Refused(what=what, reason=reason) for what, reason in refused]


def _interval(row: Row, name: str) -> tuple[float | None, float | None]:
    return row[f"{name}_low"], row[f"{name}_high"]


def _judged(row: Row, name: str, level: float) -> dict[str, Any]:
    return {"interval": _interval(row, name), "level": level} | _reasons(row)


def _reasons(row: Row) -> dict[str, Any]:
    return {"verdict": row["verdict"], "reasons": names_of(row["reasons"]), "explanation": row["explanation"]}


def _named(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _series(row: Row) -> dict[str, Any]:
    return _named(row, "model", "optimizer", "protocol", "target_loss_nats")


def _pair(row: Row, *more: str) -> dict[str, Any]:
    return _named(row, "model", "baseline", "challenger", "protocol", *more)


def _tokens_to_target(row: Row, level: float) -> contract.TokensToTarget:
    reasons = names_of(row["reasons"])
    return contract.TokensToTarget(
        **_series(row),
        **_named(row, "global_batch_tokens", "tokens_to_target", "steps_to_target"),
        n=row["num_seeds"],
        n_censored=row["num_censored"],
        status=next((status for status in _STATUSES if status in reasons), "reached"),
        learning_rate=row["best_lr"],
        **_judged(row, "tokens_to_target", level),
    )


def _critical_batch(row: Row, level: float) -> contract.CriticalBatch:
    parameters = ("t_min_tokens", "s_min_steps", "exponent", "tail_slope")
    return contract.CriticalBatch(
        **_series(row),
        **_named(row, "definition", "branch_tokens", "critical_batch_tokens", "residuals", "num_batches"),
        **_named(row, "lack_of_fit_p", "rms_residual", "aicc"),
        parameters=_named(row, *parameters),
        parameter_intervals={name: _interval(row, name) for name in parameters},
        **_judged(row, "critical_batch_tokens", level),
    )


def _token_ratio(row: Row, level: float) -> contract.TokenRatio:
    return contract.TokenRatio(
        **_pair(row, "target_loss_nats", "global_batch_tokens", "tokens_saved", "num_pairs"),
        ratio=row["token_ratio"],
        tokens_saved_interval=_interval(row, "tokens_saved"),
        **_judged(row, "token_ratio", level),
    )


def _ratio_trend(row: Row, level: float) -> contract.RatioTrend:
    return contract.RatioTrend(
        **_pair(row, "target_loss_nats", "slope", "largest_drop"),
        largest_drop_interval=_interval(row, "largest_drop"),
        **_judged(row, "slope", level),
    )


def _ratio_part(row: Row, level: float) -> contract.RatioPart:
    return contract.RatioPart(**_pair(row, "target_loss_nats", "quantity", "value"), **_judged(row, "value", level))


def _rate_rule(row: Row, level: float) -> contract.RateRule:
    return contract.RateRule(
        **_pair(row, "target_loss_nats", "rule", "global_batch_tokens"),
        ratio=row["token_ratio"],
        **_judged(row, "token_ratio", level),
    )


def _loss_law(row: Row, level: float) -> contract.LossLaw:
    return contract.LossLaw(
        **_named(row, "model", "optimizer", "protocol", "global_batch_tokens", "floor_nats", "exponent"),
        **_named(row, "log_prefactor", "num_budgets", "min_tokens", "max_tokens"),
        floor_nats_interval=_interval(row, "floor_nats"),
        **_judged(row, "exponent", level),
    )


def _laws(frame: pl.DataFrame, level: float) -> Iterator[contract.Law]:
    """Put the terms of each law, a row each in the table, into one."""
    keys = ["of", "definition", "model", "optimizer", "protocol", "target_loss_nats", "by"]
    for _, terms in frame.filter(~_REFUSED).group_by(keys, maintain_order=True):
        rows = terms.rows(named=True)
        first = rows[0]
        yield contract.Law(
            **_named(first, *keys[:-1], "prefactor"),
            by=first["by"].split(", "),
            exponents={row["term"]: row["exponent"] for row in rows},
            intervals={row["term"]: _interval(row, "exponent") for row in rows}
            | {"prefactor": _interval(first, "prefactor")},
            level=level,
            n=first["num_points"],
            **_reasons(first),
        )


def _final_loss(row: Row, level: float) -> contract.FinalLoss:
    return contract.FinalLoss(
        **_named(row, "model", "optimizer", "protocol", "global_batch_tokens", "token_budget", "final_loss_nats"),
        learning_rate=row["peak_lr"],
        n=row["num_runs"],
        **_judged(row, "final_loss_nats", level),
    )


def _gap(row: Row, level: float) -> contract.Gap:
    return contract.Gap(
        **_pair(row, "global_batch_tokens", "token_budget", "gap_nats", "p_value", "p_value_holm"),
        **_judged(row, "gap_nats", level),
    )


def _iso_loss(row: Row, level: float) -> contract.IsoLossBatch:
    return contract.IsoLossBatch(
        **_pair(row, "global_batch_tokens", "token_budget", "batch_ratio", "lower_bound"),
        **_judged(row, "batch_ratio", level),
    )


def _speedup(row: Row, level: float) -> contract.Speedup:
    return contract.Speedup(**_pair(row, "token_budget", "token_ratio"), **_judged(row, "token_ratio", level))


def _point(row: Row, level: float) -> contract.Point:
    return contract.Point(
        **_series(row),
        **_named(row, "kind", "device", "global_batch_tokens", "num_devices", "train_seconds", "device_seconds"),
        **_named(row, "train_flops", "model_error", "on_frontier", "on_flops_frontier"),
        device_seconds_interval=_interval(row, "device_seconds"),
        **_judged(row, "train_seconds", level),
    )


def _dominance(row: Row, level: float) -> contract.Dominance:
    return contract.Dominance(
        **_pair(row, "target_loss_nats", "kind", "cost", "share", "cost_ratio", "from_seconds", "to_seconds"),
        cost_ratio_interval=_interval(row, "cost_ratio"),
        **_judged(row, "share", level),
    )


def _choice(row: Row) -> contract.Choice:
    names = ("question", "limit", "optimizer", "global_batch_tokens", "num_devices", "train_seconds", "device_seconds")
    return contract.Choice(
        **_named(row, "model", "target_loss_nats", "protocol", "kind", *names),
        **_reasons(row),
    )
