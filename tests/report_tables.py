"""Tables made by hand for what the report shows of them: definitions, one-sided intervals, nulls, verdicts."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import polars as pl

from analysis.estimate import EstimateOptions, Estimates, estimate
from analysis.schemas import TABLES, table
from tests.diagnostic_rows import with_diagnostics

PAIR = {"model": "lab", "baseline": "adamw", "challenger": "muon", "protocol": "constant_ema"}
OPTIMIZERS = ("adamw", "muon")
BATCHES = (256, 1024, 4096, 16384)
TARGETS = (2.2, 2.1, 2.0)
BUDGETS = (100_000, 400_000)
Interval = tuple[float | None, float | None, float | None]
NOTHING: Interval = (None, None, None)


def complete(estimates: Estimates) -> Estimates:
    """Put tables made by hand in the place of those of the laboratory."""
    made = {
        "critical_batches": [*criticals(), *branches()],
        "laws": laws(),
        "ratio_decomposition": decomposition(),
        "rate_rules": rules(),
        "gaps": gaps(),
        "iso_loss": iso_loss(),
        "speedups": speedups(),
        "dominance": dominance(),
        "choices": choices(),
        "tuning": tuning(),
    }
    measured = estimate(with_diagnostics(estimates.records), EstimateOptions(questions=("diagnostics",)))
    of_diagnostics = {name: getattr(measured, name) for name in ("noise_scales", "sharpness", "sharpness_ratios")}
    tables = {name: table(rows, TABLES[name]) for name, rows in made.items()}
    return replace(estimates, records=measured.records, **tables, **of_diagnostics)


def with_rivals(estimates: Estimates) -> Estimates:
    """Give the baseline three challengers, with equal token ratios."""
    ratios = estimates.token_ratios
    rivals = [ratios.with_columns(challenger=pl.lit(name)) for name in ("lamb", "lion")]
    return replace(estimates, token_ratios=pl.concat([ratios, *rivals]))


def row(name: str, **values: Any) -> dict[str, Any]:
    """Return a row of a table: null where nothing is given, sound where no verdict is."""
    columns = TABLES[name]
    assert values.keys() <= columns.keys(), values.keys() - columns.keys()
    sound = {"verdict": "ok", "reasons": "", "explanation": ""}
    return dict.fromkeys(columns, None) | {key: sound[key] for key in sound if key in columns} | values


def judged(verdict: str, words: str) -> dict[str, str]:
    return {"verdict": verdict, "reasons": verdict, "explanation": words}


def within(name: str, interval: Interval) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def criticals() -> Iterable[Mapping[str, Any]]:
    definitions: dict[tuple[str, str], tuple[Interval, Mapping[str, str]]] = {
        ("emin_over_smin", "log"): ((2000.0, 1500.0, 2700.0), {}),
        ("emin_over_smin", "raw_tokens"): ((1700.0, 1200.0, 2300.0), {}),
        ("overhead_20pct", "log"): (
            (710.0, 600.0, 850.0),
            {"reasons": "ok", "explanation": "reference batch 256 tokens"},
        ),
        ("token_optimal", "log"): ((1024.0, 256.0, None), {}),
        ("token_optimal_5pct", "log"): ((1024.0, 256.0, 4096.0), {}),
        ("piecewise_kink", "log"): ((3000.0, None, None), judged("few_points", "4 batches, 3 parameters")),
        ("free_exponent", "log"): (NOTHING, judged("not_identified", "the exponent and the knee trade off")),
    }
    factors = {"adamw": 1.0, "muon": 1.6}
    for optimizer in OPTIMIZERS:
        for target in TARGETS:
            for (definition, residuals), (interval, words) in definitions.items():
                scaled = tuple(None if end is None else end * factors[optimizer] for end in interval)
                names = {"optimizer": optimizer, "target_loss_nats": target, "definition": definition}
                values = within("critical_batch_tokens", scaled) | words  # type: ignore[arg-type]
                fit = {"num_batches": 4, "t_min_tokens": 100_000.0 * 2.2 / target, "s_min_steps": 50.0}
                yield row(
                    "critical_batches",
                    model="lab",
                    protocol="constant_ema",
                    residuals=residuals,
                    **names,
                    **values,
                    **fit,
                )


def branches() -> Iterable[Mapping[str, Any]]:
    numbers = {65_536: (512.0, 512.0, 1024.0), 262_144: (1024.0, 512.0, 2048.0), 1_048_576: (None, 4096.0, None)}
    for optimizer in OPTIMIZERS:
        for at_tokens, interval in numbers.items():
            words = {} if interval[0] else judged("not_identified", "the loss has not risen by the largest batch tried")
            names = {"model": "lab", "optimizer": optimizer, "protocol": "constant_ema", "definition": "branched"}
            values = within("critical_batch_tokens", interval) | words  # type: ignore[operator]
            yield row("critical_batches", branch_tokens=at_tokens, residuals="", num_batches=4, **names, **values)


def decomposition() -> Iterable[Mapping[str, Any]]:
    values: dict[str, Interval] = {
        "ratio_small_batch": (1.51, 1.33, 1.72),
        "ratio_large_batch": (2.43, 2.05, 2.9),
        "critical_batch_ratio": (1.61, 1.23, 2.11),
        "critical_batch_ratio_equal_tokens": (1.9, 1.3, 2.8),
        "exponent": (1.05, 0.8, 1.3),
        "tail_slope_difference": (0.1, -0.2, 0.4),
    }
    for target in TARGETS:
        for quantity, interval in values.items():
            yield row(
                "ratio_decomposition", **PAIR, target_loss_nats=target, quantity=quantity, **within("value", interval)
            )


def rules() -> Iterable[Mapping[str, Any]]:
    for rule, drift in (("tuned", 1.1), ("square_root", 1.05), ("fixed", 0.8)):
        for place, batch in enumerate(BATCHES):
            ratio = 1.5 * drift**place
            values = within("token_ratio", (ratio, ratio / 1.15, ratio * 1.15))
            yield row("rate_rules", **PAIR, target_loss_nats=2.0, rule=rule, global_batch_tokens=batch, **values)


def gaps() -> Iterable[Mapping[str, Any]]:
    for budget in BUDGETS:
        for place, batch in enumerate(BATCHES):
            gap = 0.05 * place - 0.03
            words = judged("few_points", "one seed") if batch == 256 else {}
            interval = (gap, None, None) if words else (gap, gap - 0.02, gap + 0.02)
            p_values = {"p_value": None, "p_value_holm": None} if words else {"p_value": 0.01, "p_value_holm": 0.04}
            names = {"global_batch_tokens": batch, "token_budget": budget, "num_pairs": 3}
            yield row("gaps", **PAIR, **names, **within("gap_nats", interval), **p_values, **words)


def iso_loss() -> Iterable[Mapping[str, Any]]:
    beyond = judged("censored", "the largest batch of Muon still does better: the ratio is above 4")
    numbers = [((2.1, 1.5, 2.9), {}), ((2.6, 1.9, 3.8), {}), ((None, 4.0, None), {"lower_bound": 4.0} | beyond)]
    for budget in BUDGETS:
        for batch, (interval, words) in zip(BATCHES, numbers, strict=False):
            place = {"global_batch_tokens": batch, "token_budget": budget}
            yield row("iso_loss", **PAIR, **place, **within("batch_ratio", interval), **words)


def speedups() -> Iterable[Mapping[str, Any]]:
    for budget, interval in zip(BUDGETS, ((1.3, 1.1, 1.6), (1.4, 1.2, 1.7)), strict=True):
        yield row("speedups", **PAIR, token_budget=budget, **within("token_ratio", interval))


def dominance() -> Iterable[Mapping[str, Any]]:
    for cost in ("device_seconds", "train_flops"):
        numbers = within("share", (0.93, 0.8, 1.0)) | within("cost_ratio", (1.6, 1.3, 2.0))
        ends = {"from_seconds": 10.0, "to_seconds": 1000.0}
        yield row("dominance", **PAIR, target_loss_nats=2.0, kind="projected", cost=cost, **numbers, **ends)


def choices() -> Iterable[Mapping[str, Any]]:
    common = {"model": "lab", "target_loss_nats": 2.0, "protocol": "constant_ema", "kind": "projected"}
    best = {"optimizer": "muon", "global_batch_tokens": 4096, "num_devices": 4, "train_seconds": 30.0}
    yield row("choices", **common, question="fastest", limit=200.0, device_seconds=120.0, **best)
    yield row("choices", **common, question="cheapest", limit=5.0, **judged("not_reached", "no point is as fast"))


def tuning() -> Iterable[Mapping[str, Any]]:
    for optimizer in OPTIMIZERS:
        yield row("tuning", model="lab", optimizer=optimizer, num_runs=28, num_settings=3, num_batches=4, tokens=10**7)


def laws() -> Iterable[Mapping[str, Any]]:
    names = {"of": "critical_batch_tokens", "definition": "emin_over_smin", "protocol": "constant_ema", "model": "lab"}
    for optimizer in OPTIMIZERS:
        numbers = within("exponent", (-2.0, -3.0, -1.0)) | within("prefactor", (8000.0, 4000.0, 16000.0))
        yield row(
            "laws",
            **names,
            optimizer=optimizer,
            by="target_loss_nats",
            term="target_loss_nats",
            num_points=3,
            **numbers,
        )


def without(frame: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """Null columns of a table, as an outside one leaves them."""
    return frame.with_columns(pl.lit(None, dtype=frame.schema[name]).alias(name) for name in columns)


def with_columns(frame: pl.DataFrame, **values: Any) -> pl.DataFrame:
    """Put one value into every row of some columns, each of the type that it has."""
    return frame.with_columns(**{name: pl.lit(value, dtype=frame.schema[name]) for name, value in values.items()})
