"""Where the text comes from: source files, and the documents in them. Knows nothing of tokens.

Every document has a key, and the key alone decides whether it is for training or validation: the document's path
relative to its root for files, its text for the lines of JSONL files and the rows of a data set.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness.config import CorpusConfig

_NOT_LIBRARY_TEXT = {
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"),
    *("site-packages", "dist-packages", "__pycache__"),
}


@dataclass(frozen=True)
class SourceFile:
    """A file of the source; `name` is its path relative to its root, with forward slashes."""

    path: Path
    name: str


class Document(NamedTuple):
    key: bytes
    text: bytes


def source_files(config: CorpusConfig) -> list[SourceFile]:
    """List the files of the source, sorted by name; a data set of Hugging Face has none.

    Raises: ValueError for missing `corpus.paths`, a path that does not exist, a folder, a glob without a match.
    """
    _check_paths(config)
    match config.source:
        case "python-stdlib":
            found = _python_files(Path(sysconfig.get_path("stdlib")), skip=_NOT_LIBRARY_TEXT)
        case "site-packages":
            roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
            found = [file for root in roots for file in _python_files(root, skip={"__pycache__"})]
        case "huggingface":
            found = []
        case _:
            found = [file for pattern in config.paths for file in _matches(pattern)]
    unique = {file.path: file for file in found}
    return sorted(unique.values(), key=lambda file: file.name)


def documents(config: CorpusConfig, files: list[SourceFile]) -> Iterator[Document]:
    """Read the documents one by one, in an order that the source alone decides.

    Raises: ValueError naming file and line of a row without text.
    """
    assert config.source != "bin", "token files have no documents"
    match config.source:
        case "jsonl":
            texts = (text for file in files for text in _jsonl_texts(file.path, config.text_field))
            yield from (Document(key=text, text=text) for text in texts)
        case "huggingface":
            yield from (Document(key=text, text=text) for text in _huggingface_texts(config))
        case _:
            yield from (Document(key=os.fsencode(file.name), text=file.path.read_bytes()) for file in files)


def is_validation(key: bytes, validation_share: float) -> bool:
    """Decide by the key alone, so that a document stays in its split whatever is added beside it."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < validation_share * 2**64


def _check_paths(config: CorpusConfig) -> None:
    needs_paths = config.source in ("text", "jsonl", "bin", "huggingface")
    if needs_paths and not config.paths:
        wanted = "the name of the data set" if config.source == "huggingface" else "files or globs"
        raise ValueError(f"corpus.paths is empty; source {config.source} needs {wanted} there")
    if config.paths and not needs_paths:
        raise ValueError(f"corpus.paths has no meaning for source {config.source}; remove it or choose source text")


def _python_files(root: Path, skip: set[str]) -> list[SourceFile]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [SourceFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return found


def _matches(pattern: str) -> list[SourceFile]:
    path = Path(pattern).expanduser().absolute()
    if path.is_dir():
        raise ValueError(f"corpus.paths: {pattern} is a folder; give a glob such as {path.name}/**/*.txt")
    if path.is_file():
        return [SourceFile(path, path.name)]
    root = _root(path)
    found = sorted(root.glob(path.relative_to(root).as_posix()))
    files = [SourceFile(file, file.relative_to(root).as_posix()) for file in found if file.is_file()]
    if not files:
        what = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise ValueError(f"corpus.paths: {pattern} {what} (looked for {path})")
    return files


def _root(pattern: Path) -> Path:
    """Return the folder above the first part that is a wildcard."""
    return next((parent for parent in pattern.parents if not glob.has_magic(str(parent))), pattern.parent)


def _jsonl_texts(path: Path, text_field: str) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(_parsed(line, path, number), text_field, f"{path}, line {number}")


def _parsed(line: bytes, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); source jsonl wants one object a line") from None


def _text_of(row: object, text_field: str, place: str) -> bytes:
    fields = row if isinstance(row, dict) else {}
    text = fields.get(text_field)
    if not isinstance(text, str):
        there = ", ".join(map(str, fields)) or "none"
        raise ValueError(f"{place}: no text under {text_field!r}; set corpus.text_field to one of its fields: {there}")
    return text.encode(errors="replace")


def _huggingface_texts(config: CorpusConfig) -> Iterator[bytes]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "source huggingface needs the extra: python -m pip install 'critbatch[hf]' (or use source jsonl)"
        ) from None
    name = " ".join(config.paths)
    try:
        rows = load_dataset(*config.paths, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"data set {name} could not be opened: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield _text_of(row, config.text_field, f"data set {name}, row {number}")
