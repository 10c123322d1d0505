"""A row of the record: one quantity of one group of layers."""

import math
from typing import Any

from harness.record import DIAGNOSTIC_COLUMNS, Value

Row = dict[str, Value]


def row_of(quantity: str, group: str, value: float | None, reason: str | None = None, **more: Any) -> Row:
    """Return a row, complete but for the run and the step; a value that is not finite is null with a reason."""
    assert more.keys() <= DIAGNOSTIC_COLUMNS.keys(), more.keys()
    if value is not None and not math.isfinite(value):
        value, reason = None, "not finite"
    known: Row = {"quantity": quantity, "group": group, "value": value, "reason": reason}
    return Row.fromkeys(DIAGNOSTIC_COLUMNS) | known | more
