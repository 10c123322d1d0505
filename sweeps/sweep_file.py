"""From a sweep's name or file, its parents and `--set key=value` to a `SweepSpec`.

A child is merged into its parent key by key: mappings merge, anything else replaces, and null goes back to the default.
`name` and `description` are the file's own and are not inherited. A relative path of the corpus or the tokenizer counts
from the folder of the file that it stands in, and from the working folder in `--set`; a `SweepSpec` has absolute ones.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from harness.config import RunConfig
from harness.frozen import nearest
from sweeps.spec import SweepSpec

PRESETS = Path(__file__).parent / "presets"

_OWN_KEYS = ("name", "description", "extends")
_AXES = ("grid", "zip")
_PATH_KEYS = ("paths", "tokenizer_path")
_RUN_KEYS = (set(RunConfig.model_fields) | {"seed"}) - {"science_version"}


class UnknownSweepError(ValueError):
    """There is no sweep of this name."""


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number (plain PyYAML reads a string) and a key given twice as an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", node.value[index][0].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_spec(sweep: str, settings: Iterable[str] = ()) -> SweepSpec:
    """Read a sweep by preset name, by path of a YAML file, or from a folder of results.

    Raises: ValueError, one line for each mistake.
    """
    content = _resolve(find_sweep(sweep, Path.cwd()), children=())
    for setting in settings:
        apply_setting(content, setting)
    content = _with_absolute_paths(_without_nulls(content), Path.cwd(), _source(content))
    return SweepSpec.parse(content, source=sweep)


def find_sweep(sweep: str, beside: Path) -> Path:
    """Return the file of `sweep`; a relative path counts from the folder `beside`. Raises: UnknownSweepError.

    The name of a preset is that preset, whatever lies beside; a folder of the same name is `./name`.
    """
    if sweep in preset_names():
        return PRESETS / f"{sweep}.yaml"
    path = beside / sweep
    if path.is_file():
        return path
    if (path / "sweep.yaml").is_file():
        return path / "sweep.yaml"
    advice = nearest(sweep, preset_names())
    raise UnknownSweepError(f"no sweep {sweep!r}: neither a file, a folder with a sweep.yaml, nor a preset; {advice}")


def apply_setting(content: dict[str, Any], setting: str) -> None:
    """Apply `key=value` (the value in YAML) to a sweep that was read.

    A key of the sweep file is set there. A key of a run (`optimizer.peak_lr`, `global_batch_tokens`, `seed`) is fixed
    for all runs: it leaves the axes.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {setting}: expected key=value, as in --set global_batch_tokens=4096")
    value = _load(text, source=f"--set {setting}")
    first = key.split(".")[0]
    if first in SweepSpec.model_fields:
        _put(content, _path(key), value)
    elif first in _RUN_KEYS:
        _fix(content, key, value)
    else:
        advice = nearest(first, _RUN_KEYS | set(SweepSpec.model_fields))
        raise ValueError(f"--set {setting}: {first!r} is a key of neither the sweep nor a run; {advice}")


def dump_spec(spec: SweepSpec) -> str:
    """Return the resolved sweep as YAML that reads back to the same sweep."""
    content = spec.model_dump(mode="json", exclude_defaults=True)
    return f"# The sweep as it was run: parents and --set are merged in.\n{yaml.safe_dump(content, sort_keys=False)}"


def _resolve(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path in children:
        raise ValueError(f"{path}: extends itself through {' → '.join(child.name for child in (*children, path))}")
    own = _read(path)
    content = {"name": path.stem} | own
    parent = content.pop("extends", None)
    inherited = _resolve(find_sweep(str(parent), path.parent), (*children, path)) if parent is not None else {}
    _refuse_empty_optimizers(own, inherited, path)
    content = _with_absolute_paths(content, path.parent.resolve(), _source(content) or _source(inherited))
    shared = {key: value for key, value in inherited.items() if key not in _OWN_KEYS}
    return _without_nulls(_merge(shared, content))


def _refuse_empty_optimizers(own: dict[str, Any], inherited: dict[str, Any], path: Path) -> None:
    """Refuse a null that takes away nothing: it was meant as a section."""
    optimizers = own.get("optimizers")
    for name, settings in optimizers.items() if isinstance(optimizers, dict) else ():
        if settings is None and name not in inherited.get("optimizers", {}):
            raise ValueError(f"{path}: optimizers.{name} is empty; give it a learning_rate, or remove it")


def _source(content: dict[str, Any]) -> Any:
    """Return base.corpus.source, or None where that is not given."""
    for key in ("base", "corpus", "source"):
        content = content.get(key) if isinstance(content, dict) else None  # type: ignore[assignment]
    return content


def _with_absolute_paths(value: Any, folder: Path, source: Any, key: str = "") -> Any:
    """Return the content with every path below one of `_PATH_KEYS`, as a section or an axis, counted from `folder`.

    The paths of a data set of Hugging Face are names, and stay.
    """
    if isinstance(value, dict):
        return {name: _with_absolute_paths(each, folder, source, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_absolute_paths(each, folder, source, key) for each in value]
    field = key.rpartition(".")[2]
    is_path = isinstance(value, str) and field in _PATH_KEYS and not value.startswith("~")
    return str(folder / value) if is_path and (field, source) != ("paths", "huggingface") else value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _load(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a sweep ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a mapping of keys such as base, optimizers and grid, found {type(content).__name__}"
        )
    return content


def _load(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        quote = "; put a glob in quotes, as in '*.txt'" if "alias" in str(error) else ""
        raise ValueError(f"{source}{place}: {error.problem}{quote}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {error}") from None


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        old = parent.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in content.items() if value is not None}
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in given.items()}


def _path(key: str) -> list[Any]:
    """Split at dots, but for the axes, whose own names have dots; numbers (batches of token_budget) become numbers."""
    first, _, rest = key.partition(".")
    if first in _AXES and rest:
        return [first, rest]
    return [int(part) if part.isdigit() else part for part in key.split(".")]


def _put(content: dict[str, Any], path: list[Any], value: Any) -> None:
    *sections, last = path
    for depth, part in enumerate(sections):
        content = content.setdefault(part, {})
        if not isinstance(content, dict):
            section, key = (".".join(map(str, part)) for part in (path[: depth + 1], path))
            raise ValueError(f"--set {key}: {section} is {content!r}, which has no keys")
    content[last] = value


def _fix(content: dict[str, Any], key: str, value: Any) -> None:
    section, _, field = key.partition(".")
    optimizers = list(content.get("optimizers") or {})
    for axes in (content.get(name) or {} for name in _AXES):
        for axis in (key, *(f"optimizers.{name}.{field}" for name in optimizers if section == "optimizer")):
            axes.pop(axis, None)
    if section != "optimizer":
        _put(content, ["base", *_path(key)], value)
    elif not field:
        _put(content, ["grid", "optimizer"], value if isinstance(value, list) else [value])
    else:
        for name in optimizers:
            _put(content, ["optimizers", name, *field.split(".")], value)
            if field == "peak_lr":
                content["optimizers"][name].pop("learning_rate", None)
