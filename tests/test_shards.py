"""Shards that were damaged after they were built are never read: one line names the file and what to do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.config import CorpusConfig
from harness.corpus import Corpus, prepare
from harness.shards import ShardWriter, _verify_once, open_shard, read_index, smallest_dtype


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    config = CorpusConfig(source="text", paths=(f"{tmp_path}/*.txt",), validation_share=0.3)
    built = prepare(config, tmp_path / "cache")
    _verify_once.cache_clear()  # as a new process finds it
    return built


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("reader", [read_index, lambda folder: open_shard(folder, "train")])
@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"\d+ bytes where \d+ were written"),
        (flip, "its content is not what was written"),
        (Path.unlink, "missing"),
    ],
)
def test_a_damaged_shard_is_named_with_the_remedy(
    reader: Callable[[Path], object], name: str, damage: Callable[[Path], None], message: str, corpus: Corpus
) -> None:
    damage(corpus.folder / name)
    with pytest.raises(
        ValueError,
        match=rf"^{corpus.folder / name}: {message}; .* remove the folder {corpus.folder}, it is built again$",
    ):
        reader(corpus.folder)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [halve, Path.unlink, lambda path: path.write_text("{}")])
def test_a_damaged_index_is_named_with_the_remedy(damage: Callable[[Path], object], corpus: Corpus) -> None:
    path = corpus.folder / "index.json"
    damage(path)
    with pytest.raises(
        ValueError, match=rf"^{path}: missing, or not a whole index; .* remove the folder {corpus.folder}"
    ):
        read_index(corpus.folder)


def test_large_shards_are_not_hashed_at_every_start(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.shards._CHEAP_BYTES", 10)
    flip(corpus.folder / "train.bin")
    read_index(corpus.folder)
    halve(corpus.folder / "train.bin")
    with pytest.raises(ValueError, match="bytes where"):
        read_index(corpus.folder)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(128, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_smallest_dtype_holds_every_token(vocab_size: int, dtype: str) -> None:
    assert smallest_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_a_writer_counts_what_it_wrote(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train.bin", "uint16") as writer:
        writer.append(np.array([1, 300], np.uint32), text_bytes=5)
        writer.append(np.array([2], np.uint8), text_bytes=1)
    shard = writer.shard(of_text=True)
    assert (shard.tokens, shard.documents, shard.text_bytes, writer.largest_token) == (3, 2, 6, 300)
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [1, 300, 2]
