"""The base of every configuration: immutable, finite numbers, unknown keys refused by their nearest name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """A configuration section; equal contents are equal objects."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], source: str) -> Self:
        """Validate `mapping`, naming `source` (a file, an option) in the error.

        Raises: ValueError, one line for each mistake: where it is, what is wrong, the nearest valid key.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            raise ValueError("\n".join(_lines(cls, error, source))) from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the advice that ends an error about an unknown name."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"


def _lines(cls: type[BaseModel], error: ValidationError, source: str) -> Iterable[str]:
    for detail in error.errors():
        path = [str(part) for part in detail["loc"]]
        place = ".".join(path)
        if detail["type"] == "extra_forbidden":
            section = ".".join(path[:-1]) or "the top level"
            yield f"{source}: {path[-1]!r} is not a key of {section}; {nearest(path[-1], _keys(cls, path[:-1]))}"
        elif detail["type"] == "union_tag_invalid":
            tags = detail["ctx"]["expected_tags"].replace("'", "").split(", ")
            yield f"{source}: unknown {path[-1]} {detail['ctx']['tag']!r}; {nearest(detail['ctx']['tag'], tags)}"
        elif detail["type"] == "value_error":
            yield f"{source}: {place + ': ' if place else ''}{detail['ctx']['error']}"
        else:
            yield f"{source}: {place}: {detail['msg']} (given: {detail['input']!r})"


def _keys(cls: type[BaseModel], path: list[str]) -> set[str]:
    """Return the valid keys of the section at `path`, following unions by their discriminator."""
    sections: list[type[BaseModel]] = [cls]
    for part in path:
        fields = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        found = [model for annotation in fields for model in _models(annotation)]
        sections = found or [s for s in sections if part in _tags(s)] or sections
    return {key for section in sections for key in section.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _tags(section: type[BaseModel]) -> set[str]:
    field = section.model_fields.get("name")
    return {field.default} if field else set()
