"""Where text comes from, what is a document, and which split it falls in."""

import json
import sys
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.config import CorpusConfig
from harness.corpus import prepare
from harness.documents import is_validation, source_files
from harness.shards import open_shard
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
            "one.txt",
            r"corpus text one.txt: the (train|validation) split is empty \(sha256 .*\); give more documents",
        ),
    ],
)
def test_a_source_that_gives_nothing_says_why_and_leaves_nothing(
    source: str, path: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "nul.txt").write_text("\0")
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(ValueError, match=message) as raised:
        prepare(CorpusConfig(source=source, paths=(path,) if path else ()), cache)
    assert "\n" not in str(raised.value)
    assert visible(cache) == []


