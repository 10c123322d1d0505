"""Where the text comes from: source files, the documents in them, and their split. Knows nothing of tokens.

Every document has a key, and the key alone decides whether it is for training or validation: the document's path
relative to its root for files, its text for the lines of JSONL files and the rows of a data set. A single text file,
which has no others to be told from, is split by position instead and read as documents of whole lines.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from harness.config import CorpusConfig
from harness.shards import Split
from harness.user_files import one_line, reading, user_path

_NOT_LIBRARY_TEXT = {
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"),
    *("site-packages", "dist-packages", "__pycache__"),
}

#: A single text file is read in documents of about this size; a longer line is cut.
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """A file of the source; `name` is its path relative to its root, with forward slashes."""

    path: Path
    name: str


class Document(NamedTuple):
    split: Split
    text: bytes


def source_files(config: CorpusConfig) -> list[SourceFile]:
    """List the files of the source, sorted by name; a data set of Hugging Face has none.

    Raises: ValueError for settings that the source has no use for or lacks, a path that does not exist or cannot be
    read, a folder, a glob without a match.
    """
    _check_settings(config)
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

    Raises: ValueError naming a file that cannot be read, or file and line of a row without text.
    """
    assert config.source != "bin", "token files have no documents"
    if _is_single_text(config, files):
        yield from _single_text(files[0].path, config.validation_share)
        return
    for key, text in _keyed_texts(config, files):
        yield Document("validation" if is_validation(key, config.validation_share) else "train", text)


def split_rule(config: CorpusConfig, files: list[SourceFile]) -> str:
    """Say which documents are for validation."""
    if _is_single_text(config, files):
        return f"the last {config.validation_share:g} of the one file, from the start of a line"
    key = "text" if config.source in ("jsonl", "huggingface") else "path"
    return f"sha256 of the {key} below {config.validation_share:g}"


def is_validation(key: bytes, validation_share: float) -> bool:
    """Decide by the key alone, so that a document stays in its split whatever is added beside it."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < validation_share * 2**64


def _check_settings(config: CorpusConfig) -> None:
    needs_paths = config.source in ("text", "jsonl", "bin", "huggingface")
    if needs_paths and not config.paths:
        wanted = "the name of the data set" if config.source == "huggingface" else "files or globs"
        raise ValueError(f"corpus.paths is empty; source {config.source} needs {wanted} there")
    if config.paths and not needs_paths:
        raise ValueError(f"corpus.paths has no meaning for source {config.source}; remove it or choose source text")
    if config.source == "huggingface" and len(config.paths) > 2:
        raise ValueError(
            f"corpus.paths has {len(config.paths)} entries; source huggingface wants [name] or [name, configuration]"
        )
    if config.source == "bin" and config.max_tokens is not None:
        raise ValueError(
            "corpus.max_tokens has no meaning for source bin, which is read whole; remove it, or give fewer files"
        )


def _python_files(root: Path, skip: set[str]) -> list[SourceFile]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        found += [SourceFile(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return found


def _matches(pattern: str) -> list[SourceFile]:
    path = user_path(pattern, "corpus.paths")
    with reading(path):
        if path.is_dir():
            raise ValueError(f"corpus.paths: {pattern} is a folder; give a glob such as {path.name}/**/*.txt")
        if path.is_file():
            return [SourceFile(path, path.name)]
        files = _glob(path)
        if not files:
            exists = "is no regular file" if path.exists() else "does not exist"
            what = "matches no file" if glob.has_magic(pattern) else exists
            raise ValueError(f"corpus.paths: {pattern} {what} (looked for {path})")
        return files


def _glob(pattern: Path) -> list[SourceFile]:
    root = _root(pattern)
    try:
        found = sorted(root.glob(pattern.relative_to(root).as_posix()))
    except ValueError as error:
        raise ValueError(f"corpus.paths: {pattern}: {error}") from None
    return [SourceFile(file, file.relative_to(root).as_posix()) for file in found if file.is_file()]


def _root(pattern: Path) -> Path:
    """Return the folder above the first part that is a wildcard."""
    return next((parent for parent in pattern.parents if not glob.has_magic(str(parent))), pattern.parent)


def _is_single_text(config: CorpusConfig, files: list[SourceFile]) -> bool:
    return config.source == "text" and len(files) == 1


def _single_text(path: Path, validation_share: float) -> Iterator[Document]:
    """Read the validation part first: `max_tokens` may end the reading anywhere in the other."""
    with reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        cut = _validation_start(file, size, validation_share)
        yield from (Document("validation", text) for text in _pieces(file, cut, size))
        yield from (Document("train", text) for text in _pieces(file, 0, cut))


def _validation_start(file: BinaryIO, size: int, validation_share: float) -> int:
    """Return the start of the last line that begins before the last `validation_share`, but look back only over as much
    again, and at most a piece: a file of few line ends is cut within a line.
    """
    length = round(size * validation_share)
    reach = min(length, _PIECE_BYTES)
    file.seek(size - length - reach)
    return file.tell() + (file.read(reach).rfind(b"\n") + 1 or reach)


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while piece := file.read(min(_PIECE_BYTES, end - file.tell())):
        yield piece + file.readline(min(_PIECE_BYTES, end - file.tell()))


def _keyed_texts(config: CorpusConfig, files: list[SourceFile]) -> Iterator[tuple[bytes, bytes]]:
    match config.source:
        case "jsonl":
            texts = (text for file in files for text in _jsonl_texts(file.path, config.text_field))
            yield from ((text, text) for text in texts)
        case "huggingface":
            yield from ((text, text) for text in _huggingface_texts(config))
        case _:
            yield from ((os.fsencode(file.name), _read(file.path)) for file in files)


def _read(path: Path) -> bytes:
    with reading(path):
        return path.read_bytes()


def _jsonl_texts(path: Path, text_field: str) -> Iterator[bytes]:
    with reading(path), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(_parsed(line, path, number), text_field, f"{path}, line {number}")


def _parsed(line: bytes, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); source jsonl wants one object a line") from None


def _text_of(row: object, text_field: str, place: str) -> bytes:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {one_line(row)} is no object; source jsonl wants one object a line")
    text = row.get(text_field)
    if not isinstance(text, str):
        held = f" ({one_line(text)})" if text_field in row else ""
        fields = one_line(", ".join(map(str, row)) or "none")
        raise ValueError(
            f"{place}: no text under {text_field!r}{held}; set corpus.text_field to one of its fields: {fields}"
        )
    return text.encode(errors="replace")


def _huggingface_texts(config: CorpusConfig) -> Iterator[bytes]:
    name = " ".join(config.paths)
    for number, row in enumerate(_huggingface_rows(config, name), start=1):
        yield _text_of(row, config.text_field, f"data set {name}, row {number}")


def _huggingface_rows(config: CorpusConfig, name: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "source huggingface needs the extra: python -m pip install 'critbatch[hf]' (or use source jsonl)"
        ) from None
    try:
        yield from load_dataset(*config.paths, split="train", streaming=True)
    except Exception as error:  # the package raises many kinds, when it opens a data set and while it streams
        raise ValueError(f"data set {name} could not be read: {one_line(error)}") from error
