"""Where text comes from, what is a document, and which split it falls in."""

import builtins
import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness.documents
from harness.config import CorpusConfig
from harness.corpus import prepare
from harness.documents import documents, is_validation, source_files
from harness.shards import open_shard, read_index
from tests.texts import SHARE, split_documents, visible, write_texts


def test_the_share_of_validation_documents_is_as_asked() -> None:
    chosen = sum(is_validation(str(number).encode(), 0.05) for number in range(20_000))
    assert abs(chosen - 1000) < 150  # five standard deviations


def test_jsonl_is_split_by_its_text_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    rows = [{"body": f"page {number} é"} for number in range(30)]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    config = CorpusConfig(source="jsonl", paths=(str(path),), text_field="body", validation_share=SHARE)
    found = split_documents(prepare(config, tmp_path / "cache"))
    texts = [row["body"].encode() for row in rows]
    assert found["validation"] == [text for text in texts if is_validation(text, SHARE)]
    assert found["train"] == [text for text in texts if not is_validation(text, SHARE)]

    with pytest.raises(ValueError, match=rf"^{path}, line 1: no text under 'text'; .* one of its fields: body$"):
        prepare(config.model_copy(update={"text_field": "text"}), tmp_path / "cache")
    path.write_text(json.dumps(rows[0]) + "\n{torn")
    with pytest.raises(ValueError, match=rf"^{path}, line 2: not JSON"):
        prepare(config, tmp_path / "cache")
    assert len(visible(tmp_path / "cache")) == 1


def test_huggingface_is_streamed_once_and_then_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(*names: str, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((names, split, streaming))
        return [{"text": f"row {number}"} for number in range(30)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    config = CorpusConfig(source="huggingface", paths=("who/what", "sample"), validation_share=SHARE)
    corpus = prepare(config, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare(config, tmp_path / "cache") == corpus
    assert calls == [(("who/what", "sample"), "train", True)]
    assert sorted(chain(*split_documents(corpus).values())) == sorted(b"row %d" % number for number in range(30))

    with pytest.raises(ValueError, match=r"needs the extra: python -m pip install 'critbatch\[hf\]'"):
        prepare(config.model_copy(update={"paths": ("who/other",)}), tmp_path / "cache")


def test_python_stdlib_is_the_library_without_its_tests(tmp_path: Path) -> None:
    started = time.perf_counter()
    config = CorpusConfig(source="python-stdlib", tokenizer="ascii")
    corpus = prepare(config, tmp_path)
    assert time.perf_counter() - started < 10  # about 0.1 s; the bound only catches a per-byte loop
    names = {file.name for file in source_files(config)}
    assert {"argparse.py", "asyncio/tasks.py"} <= names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "site-packages"}
    assert 7_000_000 < corpus.train_tokens + corpus.validation_tokens < 14_000_000
    assert corpus.vocab_size == 128
    assert open_shard(corpus.folder, "train").max() <= 127


def test_site_packages_hold_what_is_installed() -> None:
    assert "numpy/__init__.py" in {file.name for file in source_files(CorpusConfig(source="site-packages"))}


def test_files_are_in_the_order_of_their_names_not_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_texts(tmp_path / "text")
    names = [file.name for file in source_files(config)]
    in_order = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: reversed(list(in_order(path, pattern))))
    assert [file.name for file in source_files(config)] == names == sorted(names)


def test_a_file_that_two_globs_match_is_read_once(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    twice = config.model_copy(update={"paths": (*config.paths, f"{tmp_path}/text/part1/*.txt")})
    assert len(source_files(twice)) == 20


def test_few_files_that_all_fall_into_one_split_are_explained(tmp_path: Path) -> None:
    assert is_validation(b"1.txt", 0.2)
    assert is_validation(b"2.txt", 0.2)
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("a document")
    config = CorpusConfig(source="text", paths=(f"{tmp_path}/*.txt",), validation_share=0.2)
    with pytest.raises(
        ValueError, match=r"all of the 2 files fell into the 20 % kept for validation; lower corpus.val"
    ):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("text", "none/*.txt", r"corpus.paths: none/\*.txt matches no file \(looked for .*/none/\*.txt\)"),
        ("text", "none.txt", r"corpus.paths: none.txt does not exist \(looked for .*/none.txt\)"),
        ("jsonl", "folder", r"corpus.paths: folder is a folder; give a glob such as folder/\*\*/\*.txt"),
        ("bin", None, r"corpus.paths is empty; source bin needs files or globs there"),
        ("huggingface", None, r"corpus.paths is empty; source huggingface needs the name of the data set there"),
        ("python-stdlib", "a.txt", r"corpus.paths has no meaning for source python-stdlib"),
        ("text", "nul.txt", r"corpus text nul.txt has no documents \(1 are empty or hold a NUL byte\)"),
        (
            "text",
            "o*.txt",
            r"corpus text o\*.txt: none of the 2 files fell into the 5 % kept for validation; raise .*"
            r", or join them into one file, which is split by position$",
        ),
        ("text", "empty.txt", r"corpus text empty.txt has no documents; give files that hold text"),
        (
            "text",
            "tiny.txt",
            r"the validation split is empty \(the last 0.05 of the one file, .*\); give more documents",
        ),
        ("text", "f*r", r"corpus.paths: f\*r matches no file"),
        ("text", "pipe", r"corpus.paths: pipe is no regular file"),
        ("text", "loop", r"corpus.paths: loop does not exist"),
        (
            "text",
            "~nobody-of-this-name/a.txt",
            r"corpus.paths: the home folder of ~nobody.* is not known; write the path",
        ),
        ("text", "a**b.txt", r"corpus.paths: .*a\*\*b.txt.*(only be an entire path component|matches no file)"),
        ("text", "x" * 5000, r"x+ cannot be read \(File name too long\)"),
    ],
)
def test_a_source_that_gives_nothing_says_why_and_leaves_nothing(
    source: str, path: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "other.txt").write_text("a document")
    (tmp_path / "nul.txt").write_text("\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tiny.txt").write_text("tiny")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(ValueError, match=message) as raised:
        prepare(CorpusConfig(source=source, paths=(path,) if path else ()), cache)
    assert "\n" not in str(raised.value)
    assert visible(cache) == []


def single_file(path: Path, content: bytes, **more: object) -> CorpusConfig:
    path.write_bytes(content)
    return CorpusConfig(source="text", paths=(str(path),), **more)


def parts(config: CorpusConfig) -> dict[str, bytes]:
    found = list(documents(config, source_files(config)))
    return {split: b"".join(text for of, text in found if of == split) for split in ("train", "validation")}


def test_a_single_text_file_is_split_at_the_line_end_before_its_last_share(tmp_path: Path) -> None:
    """Of 1200 bytes the last 120 begin at 1080, within the line that starts at 1068."""
    content = b"".join(b"speech %4d\n" % number for number in range(100))
    config = single_file(tmp_path / "input.txt", content, validation_share=0.1)
    corpus = prepare(config, tmp_path / "cache")
    assert split_documents(corpus) == {"train": [content[:1080]], "validation": [content[1080:]]}
    assert read_index(corpus.folder).split_rule == "the last 0.1 of the one file, from the start of a line"
    longer = config.model_copy(update={"validation_share": 0.105})
    assert parts(longer) == {"train": content[:1068], "validation": content[1068:]}


def test_a_second_text_file_brings_back_the_split_by_path(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text", count=1)
    (tmp_path / "text" / "other.txt").write_text("another\n")
    for file, (split, text) in zip(source_files(config), documents(config, source_files(config)), strict=True):
        assert text == file.path.read_bytes()
        assert (split == "validation") == is_validation(file.name.encode(), SHARE)


@settings(deadline=None, max_examples=200)
@given(content=st.text("a\n", max_size=60).map(str.encode), share=st.floats(0.01, 0.49), piece=st.integers(1, 20))
def test_a_single_text_file_is_whole_whatever_its_lines(
    content: bytes, share: float, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = single_file(tmp_path_factory.mktemp("single") / "a.txt", content, validation_share=share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.documents, "_PIECE_BYTES", piece)
        found = list(documents(config, source_files(config)))
        assert all(0 < len(text) <= 2 * piece for _, text in found)
        split = parts(config)
    assert split["train"] + split["validation"] == content
    length = round(len(content) * share)
    at = len(content) - length
    starts = [start for start in range(at - min(length, piece) + 1, at + 1) if content[start - 1 : start] == b"\n"]
    assert len(split["train"]) == max(starts, default=at)


def test_documents_of_a_single_file_are_whole_lines(tmp_path: Path) -> None:
    content = b"".join(b"line %d\n" % number for number in range(50_000))
    found = list(documents(config := single_file(tmp_path / "a.txt", content), source_files(config)))
    assert len(found) == 1 + 8  # 539 kB of text, 64 kB a document
    assert all(text.endswith(b"\n") for _, text in found)


def test_max_tokens_ends_the_reading_with_the_document_that_reaches_it(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text", count=40)
    whole = prepare(config, tmp_path / "cache")
    texts = split_documents(whole)["train"]
    enough = sum(len(text) + 1 for text in texts[:15])
    for limit, count in ((enough - 1, 15), (enough, 15), (enough + 1, 16)):
        part = prepare(config.model_copy(update={"max_tokens": limit}), tmp_path / "cache")
        assert split_documents(part)["train"] == texts[:count]
        assert part.folder != whole.folder
        assert part.fingerprint != whole.fingerprint
    all_of_it = prepare(config.model_copy(update={"max_tokens": 10**9}), tmp_path / "cache")
    assert all_of_it.fingerprint == whole.fingerprint


def test_max_tokens_of_a_single_file_leaves_its_validation_part_alone(tmp_path: Path) -> None:
    content = b"".join(b"line %d\n" % number for number in range(50_000))
    config = single_file(tmp_path / "a.txt", content)
    whole = split_documents(prepare(config, tmp_path / "cache"))
    corpus = prepare(config.model_copy(update={"max_tokens": 100_000}), tmp_path / "cache")
    part = split_documents(corpus)
    assert part["validation"] == whole["validation"]
    assert part["train"] == whole["train"][:2]
    assert 100_000 <= corpus.train_tokens < 200_000


def test_max_tokens_streams_no_further_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(10_000):
            read.append(number)
            yield {"text": f"row {number:04}"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows()))
    config = CorpusConfig(source="huggingface", paths=("who/what",), validation_share=SHARE, max_tokens=90)
    corpus = prepare(config, tmp_path)
    assert corpus.train_tokens == 90  # ten rows of nine tokens
    assert len(read) == len(list(chain(*split_documents(corpus).values())))


def test_an_empty_split_under_max_tokens_says_so(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text").model_copy(update={"max_tokens": 1, "validation_share": 0.01})
    with pytest.raises(ValueError, match=r"the validation split is empty .* or raise corpus.max_tokens from 1$"):
        prepare(config, tmp_path / "cache")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"source": "bin", "paths": ("a.bin",), "max_tokens": 5}, "max_tokens has no meaning for source bin"),
        ({"source": "huggingface", "paths": ("a", "b", "c")}, r"has 3 entries; source huggingface wants \[name\] or"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source_files(CorpusConfig(**setting))


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), RuntimeError("no\nroute")])
@pytest.mark.parametrize("late", [False, True])
def test_a_data_set_that_fails_is_one_line_and_leaves_nothing(
    error: Exception, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object, **__: object) -> Iterator[dict[str, str]]:
        def rows() -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise error

        if late:
            return rows()
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"^data set who/what could not be read: no route$"):
        prepare(CorpusConfig(source="huggingface", paths=("who/what",)), tmp_path)
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', r"not JSON \('utf-8' codec can't decode byte 0xff"),
        (b'{"text": null, "id": 1}', r"no text under 'text' \(None\); set .* one of its fields: text, id$"),
        (b'{"bo\\ndy": 1}', r"no text under 'text'; set .* one of its fields: bo dy$"),
        (b"[1, 2]", r"\[1, 2\] is no object; source jsonl wants one object a line"),
        (b"[" * 100_000, r"not JSON \(maximum recursion depth"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_in_one_line(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"^{path}, line 2: {message}") as raised:
        prepare(CorpusConfig(source="jsonl", paths=(str(path),)), tmp_path / "cache")
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)
    assert visible(tmp_path / "cache") == []


def test_a_loop_of_folders_is_walked_once(tmp_path: Path) -> None:
    config = write_texts(tmp_path / "text")
    (tmp_path / "text" / "part1" / "again").symlink_to(tmp_path / "text")
    assert len({file.path.resolve() for file in source_files(config)}) == len(source_files(config)) == 20


@pytest.mark.parametrize(("source", "number"), [("text", 1), ("text", 2), ("jsonl", 1), ("bin", 1)])
def test_a_file_that_may_not_be_read_is_named(
    source: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(number):
        (tmp_path / f"{index}.secret").write_bytes(b"abcd" * 10)
    really_open = io.open

    def refuse(path: object, *arguments: object, **more: object) -> object:
        if str(path).endswith(".secret"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)  # numpy's
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/0.secret cannot be read \(Permission denied\); make it readable"
    ):
        prepare(CorpusConfig(source=source, paths=(f"{tmp_path}/*.secret",)), tmp_path / "cache")
    assert visible(tmp_path / "cache") == []
