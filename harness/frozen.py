"""The base of every configuration: immutable, finite numbers, unknown keys refused by their nearest name."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from harness.user_files import one_line

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

#: Marks a field (`Annotated[…, ADDED_LATER]`) that came after runs had been recorded: it is written, and so hashed into
#: a run's identity, only where it is not at its default. Identities and records from before it stay what they were.
ADDED_LATER = "added later"

#: Names that other programs use, for advice where our name is one of the valid ones.
_ALIASES = {
    "batch": ("global_batch_tokens",),
    "batch_size": ("global_batch_tokens",),
    "lr": ("learning_rate", "peak_lr"),
    "beta1": ("betas",),
    "beta2": ("betas",),
    "warmup_steps": ("warmup_min_steps",),
    "max_steps": ("token_budget",),
    "seq_len": ("sequence_length",),
}

_WHOLE, _MAPPING = "a whole number", "a mapping of keys"
#: What was expected, by pydantic's type of the error.
_FORMS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), _WHOLE),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _MAPPING),
    "union_tag_not_found": "a mapping with the key {discriminator}",
    "string_type": "text",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


class Frozen(BaseModel):
    """A configuration section; equal contents are equal objects.

    A field's `examples` end the error about a value of another form; `list_advice` does where one value belongs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    list_advice: ClassVar[str] = ""

    @classmethod
    def parse(cls, mapping: Mapping[str, Any], source: str) -> Self:
        """Validate `mapping`, naming `source` (a file, an option) in the error.

        Raises: ValueError, one line for each mistake: where it is, what is wrong, the nearest valid key.
        """
        try:
            return cls.model_validate(mapping)
        except ValidationError as error:
            lines = "\n".join(_lines(cls, error.errors(), mapping)).splitlines()
            raise ValueError("\n".join(f"{source}: {line}" for line in lines)) from None

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, given: Any) -> Any:
        """Refuse true and false where pydantic would read 1 and 0."""
        for key, field in cls.model_fields.items():
            value = given.get(key) if isinstance(given, dict) else None
            if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{key} cannot be {str(value).lower()}")
        return given

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for name, field in type(self).model_fields.items():
            if ADDED_LATER in field.metadata and getattr(self, name) == field.default:
                written.pop(name, None)
        return written


def dotted(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by their dotted keys; an empty mapping is a value."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the advice that ends an error about an unknown name."""
    names = sorted(valid)
    known = [alias for alias in _ALIASES.get(name, ()) if alias in names]
    close = known or difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(names)}"


def _lines(cls: type[Frozen], errors: Iterable["ErrorDetails"], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each place; what is wrong inside a section goes before what is said of it as a whole."""
    places: dict[tuple[Any, ...], list[ErrorDetails]] = {}
    for error in errors:
        places.setdefault(_place(cls, error["loc"], given), []).append(error)
    for place, at_place in places.items():
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places):
            yield _line(cls, place, at_place)


def _place(cls: type[Frozen], loc: tuple[Any, ...], given: Any) -> tuple[Any, ...]:
    """Return `loc` without pydantic's own parts: the names of a union's branches are neither given nor keys."""
    place: tuple[Any, ...] = ()
    for part in loc:
        inside = isinstance(given, Mapping) and part in given
        if inside or isinstance(part, int) or part in _keys(cls, place):
            place += (part,)
            given = given[part] if inside or (isinstance(given, list | tuple) and part < len(given)) else None
    return place


def _line(cls: type[Frozen], place: tuple[Any, ...], errors: list["ErrorDetails"]) -> str:
    name = ".".join(map(str, place))
    error = next((error for error in errors if error["type"] not in _FORMS), errors[0])
    *section, key = error["loc"] or ("",)
    match error["type"]:
        case "missing":
            return f"{name} is missing"
        case "extra_forbidden":
            above = name.rpartition(".")[0] or "the top level"
            return f"{key!r} is not a key of {above}; {nearest(str(key), _keys(cls, section))}"
        case "union_tag_invalid":
            tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"].replace("'", "").split(", ")
            return f"unknown {key} {tag!r}; {nearest(tag, tags)}"
        case "value_error":
            return f"{name}: {error['ctx']['error']}" if place else str(error["ctx"]["error"])
        case _:
            forms = " or ".join(dict.fromkeys(_form(each) for each in errors))
            return f"{name}: expected {forms}, not {one_line(repr(error['input']))}{_advice(cls, place, error)}"


def _form(error: "ErrorDetails") -> str:
    form = _FORMS.get(error["type"])
    return form.format(**error.get("ctx", {})) if form else error["msg"].removeprefix("Input should be ")


def _advice(cls: type[Frozen], place: tuple[Any, ...], error: "ErrorDetails") -> str:
    *section, key = place
    fields = [each.model_fields[key] for each in _sections(cls, section) if key in each.model_fields]
    examples = [example for field in fields for example in field.examples or ()]
    if examples:
        return f"; for example {key}: {examples[0]}"
    advises = cls.list_advice and isinstance(error["input"], list)
    return f"; {cls.list_advice.format('.'.join(map(str, place)))}" if advises else ""


def _keys(cls: type[BaseModel], path: Iterable[Any]) -> set[str]:
    """Return the valid keys of the section at `path`."""
    return {key for section in _sections(cls, path) for key in section.model_fields}


def _sections(cls: type[BaseModel], path: Iterable[Any]) -> list[type[BaseModel]]:
    """Return the kinds of section that may be at `path`, following unions by their discriminator."""
    sections: list[type[BaseModel]] = [cls]
    for part in path:
        fields = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        found = [model for annotation in fields for model in _models(annotation)]
        sections = found or [s for s in sections if part in _tags(s)] or sections
    return sections


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _tags(section: type[BaseModel]) -> set[str]:
    field = section.model_fields.get("name")
    return {field.default} if field else set()
