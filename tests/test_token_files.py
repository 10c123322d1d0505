"""Token files as nanoGPT and modded-nanogpt write them."""

from pathlib import Path

import numpy as np
import pytest

from harness.config import CorpusConfig
from harness.corpus import prepare
from harness.shards import open_shard
from harness.token_files import read_tokens


def write_bare(path: Path, tokens: list[int]) -> Path:
    np.array(tokens, "<u2").tofile(path)
    return path


def write_with_header(path: Path, tokens: list[int], version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return path


def cut_header(path: Path) -> Path:
    path.write_bytes(write_with_header(path, [], count=5).read_bytes()[:100])
    return path


def bin_config(*paths: Path, **more: object) -> CorpusConfig:
    return CorpusConfig(source="bin", paths=tuple(map(str, paths)), **more)


def test_both_kinds_of_token_file_are_told_apart(tmp_path: Path) -> None:
    tokens = [50_256, 1, 2, 40_000]
    assert read_tokens(write_bare(tmp_path / "bare.bin", tokens)).tolist() == tokens
    assert read_tokens(write_with_header(tmp_path / "header.bin", tokens)).tolist() == tokens
    assert read_tokens(write_bare(tmp_path / "tiny.bin", [7])).tolist() == [7]


def test_files_with_val_in_their_name_are_the_validation_split(tmp_path: Path) -> None:
    write_with_header(tmp_path / "fineweb_train_000002.bin", [3, 4])
    write_with_header(tmp_path / "fineweb_train_000001.bin", [1, 2])
    write_with_header(tmp_path / "fineweb_val_000000.bin", [9, 8])
    corpus = prepare(bin_config(tmp_path / "*.bin"), tmp_path / "cache")
    assert open_shard(corpus.folder, "train").tolist() == [1, 2, 3, 4]
    assert open_shard(corpus.folder, "validation").tolist() == [9, 8]


def test_without_val_files_the_last_tokens_are_the_validation_split(tmp_path: Path) -> None:
    write_bare(tmp_path / "a.bin", list(range(12)))
    write_bare(tmp_path / "b.bin", list(range(12, 20)))
    corpus = prepare(bin_config(tmp_path / "?.bin", validation_share=0.45), tmp_path / "cache")
    assert open_shard(corpus.folder, "train").tolist() == list(range(11))
    assert open_shard(corpus.folder, "validation").tolist() == list(range(11, 20))


def test_vocabulary_reaches_to_the_largest_token_and_may_be_given_larger(tmp_path: Path) -> None:
    path = write_bare(tmp_path / "a.bin", [*range(30), 50_256])
    corpus = prepare(bin_config(path), tmp_path / "cache")
    assert corpus.vocab_size == 50_257
    assert corpus.bytes_per_token is None
    assert prepare(bin_config(path, vocab_size=50_304), tmp_path / "cache").vocab_size == 50_304
    with pytest.raises(
        ValueError, match=r"corpus.vocab_size 50000 is given, but the tokens of the corpus are 0 to 50256"
    ):
        prepare(bin_config(path, vocab_size=50_000), tmp_path / "cache")


def test_damaged_token_files_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"abc")
    cases = [
        (odd, "3 bytes are no file of 16-bit tokens"),
        (write_with_header(tmp_path / "short.bin", [1, 2], count=3), "its header says 3 tokens, there are 2"),
        (cut_header(tmp_path / "cut.bin"), "its header says 5 tokens, there are 0; fetch the file again"),
        (write_with_header(tmp_path / "new.bin", [1, 2], version=2), "token file of version 2"),
    ]
    for path, message in cases:
        with pytest.raises(ValueError, match=rf"^{path}: {message}"):
            prepare(bin_config(path), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
