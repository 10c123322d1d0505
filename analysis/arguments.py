"""Kinds of values on the command line, for `type=` of `add_argument`."""

from argparse import ArgumentTypeError

from analysis.vocabulary import DEFINITIONS


def count(text: str) -> int:
    """Read a whole number above zero."""
    if not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"expected a whole number above zero, not {text!r}")
    return int(text)


def number(text: str) -> float:
    """Read a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"expected a number above zero, as 2e10, not {text!r}")
    return value


def share(text: str) -> float:
    """Read a number between 0 and 1, neither included."""
    value = number(text)
    if value >= 1:
        raise ArgumentTypeError(f"expected a share between 0 and 1, as 0.9, not {text!r}")
    return value


def definitions(text: str) -> list[str]:
    """Read definitions of the critical batch, joined by commas."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in DEFINITIONS]:
        raise ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(DEFINITIONS)}; several are joined by commas")
    return names
