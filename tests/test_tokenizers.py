"""Text to tokens, and what is said when a tokenizer's file is not what it should be."""

import base64
import json
import sys
from itertools import product
from pathlib import Path

import pytest

from harness.config import CorpusConfig
from harness.tokenizers import load_tokenizer


def config_of(tokenizer: str, path: Path | None = None) -> CorpusConfig:
    return CorpusConfig(source="python-stdlib", tokenizer=tokenizer, tokenizer_path=path and str(path))


def write_ranks(path: Path, merges: list[bytes]) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + merges
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens))
    path.write_text("\n".join(lines))
    return path


def write_tokenizer_json(path: Path, words: list[str], special: str = "<|endoftext|>") -> Path:
    vocabulary = {word: number for number, word in enumerate([*words, "?"])}
    added = {"id": len(words) + 1, "content": special, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [added | flags],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
            }
        )
    )
    return path


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = load_tokenizer(config_of("bytes"))
    assert tokenizer.encode("aé\n".encode()).tolist() == [97, 195, 169, 10]
    assert (tokenizer.vocab_size, tokenizer.separator) == (256, 0)


def test_ascii_folds_every_byte_above_126_into_symbol_127() -> None:
    tokenizer = load_tokenizer(config_of("ascii"))
    assert tokenizer.encode(bytes([1, 65, 126, 127, 128, 255])).tolist() == [1, 65, 126, 127, 127, 127]
    assert (tokenizer.vocab_size, tokenizer.separator) == (128, 0)


@pytest.mark.parametrize("name", ["tiktoken", "tokenizers"])
def test_tokenizer_path_is_required_and_must_exist(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer_path is missing; tokenizer {name} needs"):
        load_tokenizer(config_of(name))
    with pytest.raises(ValueError, match=rf"{tmp_path}/nowhere does not exist"):
        load_tokenizer(config_of(name, tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=rf"{tmp_path} is no file; tokenizer {name} needs"):
        load_tokenizer(config_of(name, tmp_path))


def test_tokenizer_path_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no meaning for tokenizer bytes"):
        load_tokenizer(config_of("bytes", tmp_path))


@pytest.mark.parametrize("name", ["tiktoken", "tokenizers"])
def test_a_missing_package_names_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"python -m pip install 'critbatch\[tokenizers\]'"):
        load_tokenizer(config_of(name, write_ranks(tmp_path / "ranks", [])))


def test_tiktoken_merges_by_rank_and_ends_text_after_the_last_rank(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    tokenizer = load_tokenizer(config_of("tiktoken", write_ranks(tmp_path / "ranks", [b"th", b"the", b" the"])))
    assert tokenizer.encode(b"the then").tolist() == [257, 258, ord("n")]
    assert (tokenizer.vocab_size, tokenizer.separator) == (260, 259)


@pytest.mark.parametrize(
    ("num_ranks", "pattern", "tokens_of_1234"), [(50_256, "gpt2", 1), (50_257, "cl100k", 2), (199_998, "o200k", 2)]
)
def test_tiktoken_pattern_is_chosen_by_the_number_of_ranks(
    num_ranks: int, pattern: str, tokens_of_1234: int, tmp_path: Path
) -> None:
    """GPT-2 keeps a run of digits whole, the later patterns cut it after three."""
    pytest.importorskip("tiktoken")
    digits = [b"12", b"123", b"1234"]
    letters = (bytes(letters) for letters in product(range(128, 256), repeat=3))
    merges = digits + [token for token, _ in zip(letters, range(num_ranks - 256 - len(digits)), strict=False)]
    tokenizer = load_tokenizer(config_of("tiktoken", write_ranks(tmp_path / "ranks", merges)))
    assert tokenizer.identity.split()[:2] == ["tiktoken", pattern]
    assert len(tokenizer.encode(b"1234")) == tokens_of_1234


@pytest.mark.parametrize("content", [b"\x00\x01 not ranks", b"YQ== one", b"YQ==", b"YQ== 0\nYg== 1\n"])
def test_a_file_that_is_no_rank_file_is_named(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    path = tmp_path / "ranks"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: .*rank file"):
        load_tokenizer(config_of("tiktoken", path))


@pytest.mark.parametrize("rank", [5, -1, 2**31])
def test_ranks_that_no_vocabulary_has_are_refused(rank: int, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "ranks", [])
    path.write_text(f"{path.read_text()}\n{base64.b64encode(b'ab').decode()} {rank}\n")
    with pytest.raises(
        ValueError, match=rf"^{path}: not a rank file; its ranks {min(rank, 0)} to {max(rank, 255)} must"
    ):
        load_tokenizer(config_of("tiktoken", path))


def test_tokenizers_neither_cut_nor_fill_nor_take_text_for_a_special_token(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer_json(tmp_path / "tokenizer.json", ["muon", "adamw"])
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "?"}
    content["padding"] = padding | {"strategy": {"Fixed": 8}}
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(config_of("tokenizers", path))
    assert tokenizer.encode(b"muon adamw muon adamw").tolist() == [0, 1, 0, 1]
    assert tokenizer.separator not in tokenizer.encode(b"muon <|endoftext|> adamw").tolist()


def test_tokenizers_reads_a_tokenizer_json_and_finds_its_end_of_text(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer_json(tmp_path / "tokenizer.json", ["muon", "adamw"])
    tokenizer = load_tokenizer(config_of("tokenizers", path))
    assert tokenizer.encode(b"adamw muon other").tolist() == [1, 0, 2]
    assert (tokenizer.vocab_size, tokenizer.separator) == (4, 3)


def test_tokenizers_without_an_end_of_text_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = write_tokenizer_json(tmp_path / "tokenizer.json", ["muon"], special="<pad>")
    with pytest.raises(ValueError, match=rf"^{path}: has no end-of-text token"):
        load_tokenizer(config_of("tokenizers", path))


def test_a_file_that_is_no_tokenizer_json_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "model":')
    with pytest.raises(ValueError, match=rf"^{path}: not a tokenizer.json"):
        load_tokenizer(config_of("tokenizers", path))


def test_identity_follows_the_content_of_the_file_not_its_name(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    one, same, other = (
        load_tokenizer(config_of("tiktoken", write_ranks(tmp_path / name, merges))).identity
        for name, merges in (("one", [b"ab"]), ("same", [b"ab"]), ("other", [b"ba"]))
    )
    assert one == same
    assert one != other
