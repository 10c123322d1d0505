"""`critbatch optimizers`: what can stand under `optimizers` in a sweep file."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from sweeps.arguments import json_option, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from harness.optimizers.rule import Optimizer

#: The matrix whose state is counted: SOAP's depends on the shape.
_WIDTH = 1024
_FLOAT32_BYTES = 4


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verb = verbs.add_parser("optimizers", parents=[json_option()], help="list the optimizers that a sweep can name")
    verb.set_defaults(verb=optimizers)


def optimizers(options: argparse.Namespace) -> int:
    """List the optimizers by name, with their defaults, the memory of their state and their sources."""
    from harness.optimizers.config import OPTIMIZERS

    rows = [describe(name, section) for name, section in OPTIMIZERS.items()]
    if options.json:
        print(json.dumps({"optimizers": rows}, indent=1))
    else:
        print_table(_table(rows))
    return 0


def describe(name: str, section: "type[Optimizer]") -> dict[str, Any]:
    """Return what there is to say of an optimizer; null for the state of one that is not ours."""
    from pydantic_core import to_jsonable_python

    required = {"peak_lr": 1.0} | ({"path": "module:Class"} if "path" in section.model_fields else {})
    default = section.model_validate({"name": name, **required})
    numbers = default.assign("hidden", (_WIDTH, _WIDTH)).rule.state_numbers((_WIDTH, _WIDTH))
    settings = {key: getattr(default, key) for key in section.model_fields if key not in {"name", *required}}
    return {
        "name": name,
        "defaults": to_jsonable_python(settings),
        "state_bytes_per_parameter": None if "path" in required else numbers * _FLOAT32_BYTES / _WIDTH**2,
        "rest_by_adamw": default.assign("embedding", (_WIDTH, _WIDTH)).rule.algorithm != default.algorithm,
        "source": section.source,
        "experimental": section.experimental,
        "summary": " ".join((section.__doc__ or "").split("\n\n")[0].split()),
    }


def _table(rows: list[dict[str, Any]]) -> "Table":
    from sweeps.printing import narrow_table

    table = narrow_table()
    table.caption = (
        f"State: bytes in float32 for each parameter of a {_WIDTH} × {_WIDTH} matrix. * experimental.\n"
        "Each has a learning_rate; those with an auxiliary update embeddings, head and norms by AdamW."
    )
    table.caption_justify = "left"
    for column in ("optimizer", "state", "defaults", "source"):
        table.add_column(column, overflow="fold")
    for row in rows:
        state, mark = row["state_bytes_per_parameter"], "*" if row["experimental"] else ""
        defaults = ", ".join(f"{key} {_plain(value)}" for key, value in row["defaults"].items())
        table.add_row(row["name"] + mark, "?" if state is None else f"{state:.3g}", defaults, row["source"])
    return table


def _plain(value: Any) -> str:
    """Write a setting as YAML would."""
    return json.dumps(value).replace('"', "")
