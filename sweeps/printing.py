"""What all that is printed has in common: tables that fit 80 columns, and counts in words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def narrow_table() -> "Table":
    """Return a table that spends one column of the screen between two of its own, and none at the sides."""
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)


def counted(number: int, thing: str) -> str:
    """Write `1 run`, `16 runs`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
