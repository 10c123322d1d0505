"""Numbers and names as people read them: `16K`, `1.05M`, `780 [640, 960]`; a missing value is a dash.

A batch size that was run is exact and written with K = 1024; every measured or estimated quantity has three significant
digits and K = 1000.
"""

from collections.abc import Callable, Mapping
from typing import Any

MISSING = "–"

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
_TOKEN_SUFFIXES = ("", "K", "M", "B", "T")
_SI_SUFFIXES = ("", "K", "M", "G", "T", "P", "E", "Z", "Y")


def optimizer_name(name: str) -> str:
    return _OPTIMIZERS.get(name, name)


def batch(tokens: int) -> str:
    """Write a global batch exactly: 256, 1K, 1.5K, 16K, 2M with K = 1024; 1000 stays 1000."""
    for unit, suffix in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % (unit // 2) == 0:
            return f"{tokens / unit:g}{suffix}"
    return str(tokens)


def number(value: float) -> str:
    """Write three significant digits, in powers of ten only below 0.001 and from 100,000 on."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 99_950:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return _three_digits(value)


def tokens(value: float) -> str:
    """Write a number of tokens: 780, 1.87K, 1.05M, 2.10B."""
    return _scaled(value, _TOKEN_SUFFIXES)


def flops(value: float) -> str:
    """Write a number of floating-point operations: 1.20T is 1.2e12."""
    return _scaled(value, _SI_SUFFIXES)


def tick(value: float) -> str:
    """Write a round number beside an axis: 0.02, 500, 50K, 2M."""
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


def estimate(row: Mapping[str, Any], name: str) -> str:
    """Write a row's estimate with its interval: `780 [640, 960]`, `780 [≥ 640]`, `780`; a dash where there is none."""
    write = column_writer(name)
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is not None and high is not None:
        bounds = f"[{write(low)}, {write(high)}]"
    elif low is not None:
        bounds = f"[≥ {write(low)}]"
    else:
        bounds = "" if high is None else f"[≤ {write(high)}]"
    return f"{MISSING if value is None else write(value)} {bounds}".strip()


def verdict(name: str) -> str:
    """Write a verdict's identifier in words: `edge_of_grid` is `edge of grid`."""
    return name.replace("_", " ")


def judged(row: Mapping[str, Any]) -> str:
    """Write a row's verdict in words, with its reason where there is one."""
    return f"{verdict(row['verdict'])}: {row['reason']}" if row["reason"] else verdict(row["verdict"])


def column_writer(name: str) -> Callable[[Any], str]:
    """Return how the values of the column `name` are written, by the unit that its name ends with."""
    if name == "global_batch_tokens":
        return batch
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
    ("_nats", "{:.3f}".format),
    ("_lr", "{:.3g}".format),
    ("token_ratio", "{:.2f}".format),
    ("slope", "{:.2f}".format),
    ("tokens", tokens),
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
