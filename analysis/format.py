"""Numbers and names as people read them: `16K`, `1.05M`, `780 [640, 960]`; a missing value is a dash.

A power of two from 1024 on is exact and written in binary units without decimals: 1K is 1024, 1M is 1024². Everything
else has three significant digits in decimal units: 1.00K is 1000. Tables of runs write every integer in full.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MISSING = "–"

_OPTIMIZERS = {
    "adamw": "AdamW",
    "lamb": "LAMB",
    "lars": "LARS",
    "lion": "Lion",
    "mona": "MONA",
    "muon": "Muon",
    "muon_plus": "Muon+",
    "normuon": "NorMuon",
    "orscale": "OrScale",
    "orscale_lm": "OrScale-LM",
    "scion": "Scion",
    "sgd": "SGD",
    "shampoo": "Shampoo",
    "soap": "SOAP",
}
_VERDICTS = {
    "mid_schedule": "read while the learning rate decays",
    "edge_of_grid": "best learning rate at the edge of those tried",
    "single_rate": "only one learning rate was tried",
    "warmup_confounded": "target too close to the warmup",
    "censored": "some runs fell short of the target",
    "reached_at_first_eval": "reached before the first evaluation",
    "not_reached": "target not reached",
    "diverged": "diverged",
    "not_identified": "not bracketed by what was tried",
    "non_monotone": "not monotone in the batch",
    "misfit": "the curve misses the points",
    "few_points": "too few points",
    "refused": "an input is missing",
    "shared_machine": "timed on a machine shared with other work",
}
_SHORT_VERDICTS = {
    "mid_schedule": "mid-schedule",
    "edge_of_grid": "edge of rates",
    "single_rate": "one rate",
    "warmup_confounded": "near warmup",
    "censored": "some fell short",
    "reached_at_first_eval": "at target at once",
    "not_identified": "not bracketed",
    "non_monotone": "not monotone",
    "misfit": "misfit",
    "few_points": "too few points",
    "refused": "input missing",
    "shared_machine": "shared machine",
    "not_reached": "not reached",
}
_TOKEN_SUFFIXES = ("", "K", "M", "B", "T")
_SI_SUFFIXES = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")


def optimizer_name(name: str) -> str:
    """Write an optimizer's name, and that of its variant: `muon, momentum=0.95` is `Muon, momentum=0.95`."""
    own, comma, settings = name.partition(",")
    return _OPTIMIZERS.get(own, own) + comma + settings


def count(number: int, thing: str) -> str:
    """Write how many there are of a thing with a regular plural: 1 run, 2 runs."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def listed(words: Sequence[str]) -> str:
    """Join words: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def first(words: Sequence[str], most: int) -> list[str]:
    """Keep no more words than `most`; of longer lists the last one counts the rest: `3 more`."""
    return list(words) if len(words) <= most else [*words[: most - 1], f"{len(words) - most + 1} more"]


def number(value: float) -> str:
    """Write three significant digits, in powers of ten only below 0.001 and from 100,000 on."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 99_950:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return _three_digits(value)


def tokens(value: float) -> str:
    """Write a number of tokens: 780, 1.87K, 2.10B; powers of two from 1024 on in binary units, 16K, 1M."""
    if is_binary(value):
        places = min((int(value).bit_length() - 1) // 10, len(_TOKEN_SUFFIXES) - 1)
        return f"{int(value) >> 10 * places}{_TOKEN_SUFFIXES[places]}"
    return decimal_tokens(value)


def is_binary(value: float) -> bool:
    """Say whether a number is written in binary units: a power of two from 1024 on."""
    return value >= 1024 and value % 1 == 0 and int(value).bit_count() == 1


def decimal_tokens(value: float) -> str:
    """Write a number of tokens in decimal units, powers of two as well: 16.4K, where a column has other numbers too."""
    return _scaled(value, _TOKEN_SUFFIXES)


def span(low: float, high: float) -> str:
    """Write the ends of a range of tokens: 64K–4M, or 64K where there is one."""
    return "–".join(dict.fromkeys((tokens(low), tokens(high))))


def flops(value: float) -> str:
    """Write a number of floating-point operations: 1.20T is 1.2e12."""
    return _scaled(value, _SI_SUFFIXES)


def tick(value: float) -> str:
    """Write a round decimal number beside an axis: 0.02, 500, 50K, 2M."""
    return "{:g}{}".format(*_scale(value, _TOKEN_SUFFIXES))


def tick_flops(value: float) -> str:
    """Write a round number of operations beside an axis: 50G, 2T."""
    return "{:g}{}".format(*_scale(value, _SI_SUFFIXES))


def loss(nats: float) -> str:
    """Write a target loss as it was given, with at least one decimal: 2.0, 3.15."""
    return f"{nats:g}" if nats % 1 else f"{nats:.1f}"


def seconds(value: float) -> str:
    """Write a duration in the largest unit that leaves at least two: 38.1 s, 12.5 min, 7.20 h."""
    for unit, name in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if value >= 2 * unit:
            return f"{_three_digits(value / unit)} {name}"
    return f"{number(value)} s"


def estimate(row: Mapping[str, Any], name: str, write: Callable[[Any], str] | None = None) -> str:
    """Write a row's estimate with its interval: `780 [640, 960]`, `780 [≥ 640]`, `780`; a dash where there is none."""
    write = write or column_writer(name)
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is not None and high is not None:
        bounds = f"[{write(low)}, {write(high)}]"
    elif low is not None:
        bounds = f"[≥ {write(low)}]"
    else:
        bounds = "" if high is None else f"[≤ {write(high)}]"
    return f"{MISSING if value is None else write(value)} {bounds}".strip()


def verdict(name: str) -> str:
    """Write a verdict's identifier in words: `edge_of_grid` is `best learning rate at the edge of those tried`."""
    return _VERDICTS.get(name, name.replace("_", " "))


def short_verdict(name: str) -> str:
    """Write a verdict in the few words that a figure has room for: `warmup_confounded` is `near warmup`."""
    return _SHORT_VERDICTS.get(name, verdict(name))


def judged(row: Mapping[str, Any]) -> str:
    """Write what stands against a row's number: its reason, or its verdict in words where there is no more to say."""
    return str(row["explanation"] or verdict(row["verdict"]))


def column_writer(name: str) -> Callable[[Any], str]:
    """Return how the values of the column `name` are written, by the unit that its name ends with."""
    return next((write for ending, write in _WRITERS if name.endswith(ending)), plain)


def plain(value: Any) -> str:
    """Write a value without a unit: floats with three digits, truth as yes or no, everything else as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else str(value)


_WRITERS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("optimizer", optimizer_name),
    ("baseline", optimizer_name),
    ("challenger", optimizer_name),
    ("verdict", verdict),
    ("status", verdict),
    ("target_loss_nats", loss),
    ("_nats", "{:z.3f}".format),
    ("_lr", "{:.3g}".format),
    ("_ratio", "{:.2f}".format),
    ("slope", "{:z.2f}".format),
    ("share", "{:.0%}".format),
    ("model_error", "{:+.1%}".format),
    ("p_value", "{:.2g}".format),
    ("p_value_holm", "{:.2g}".format),
    ("lack_of_fit_p", "{:.2g}".format),
    ("limit", seconds),
    ("tokens", tokens),
    ("token_budget", tokens),
    ("tokens_seen", tokens),
    ("tokens_to_target", tokens),
    ("flops", flops),
    ("flops_to_target", flops),
    ("seconds", seconds),
    ("seconds_to_target", seconds),
)


def _scaled(value: float, suffixes: tuple[str, ...]) -> str:
    scaled, suffix = _scale(value, suffixes)
    return (_three_digits(scaled) if suffix or scaled % 1 else f"{scaled:g}") + suffix


def _scale(value: float, suffixes: tuple[str, ...]) -> tuple[float, str]:
    power = 0
    while abs(value) >= 999.5 and power + 1 < len(suffixes):
        value, power = value / 1000, power + 1
    return value, suffixes[power]


def _three_digits(value: float) -> str:
    """Write three significant digits, and whole numbers in full: 0.0123, 1.50, 43.2, 780, 12345."""
    exponent = int(f"{value:.2e}".split("e")[1])
    return f"{value:.{max(0, 2 - exponent)}f}"
