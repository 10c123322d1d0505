"""Tokens on disk: one memory-mapped shard a split, and an index that says what they must be.

A folder holds `train.bin`, `validation.bin` (bare little-endian tokens) and `index.json`.
"""

import hashlib
import os
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from harness.frozen import Frozen
from harness.record import write_json
from harness.user_files import reading

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
Dtype = Literal["uint8", "uint16", "uint32"]
Tokens = NDArray[np.unsignedinteger[Any]]

#: Up to this size, a process checks the content of the shards the first time it opens them.
_CHEAP_BYTES = 100_000_000


class Shard(Frozen):
    """What one shard must be. `documents` and `text_bytes` are null where the source came as tokens."""

    tokens: int
    documents: int | None
    text_bytes: int | None
    sha256: str


class ShardIndex(Frozen):
    """All that is known of a prepared corpus; `index.json`."""

    source: str
    tokenizer: str
    split_rule: str
    fingerprint: str
    vocab_size: int
    dtype: Dtype
    left_out_documents: int
    train: Shard
    validation: Shard

    def shard(self, split: Split) -> Shard:
        return self.train if split == "train" else self.validation

    @property
    def shards_bytes(self) -> int:
        return (self.train.tokens + self.validation.tokens) * np.dtype(self.dtype).itemsize


class ShardWriter:
    """Write one shard piece by piece, counting and hashing on the way."""

    def __init__(self, path: Path, dtype: Dtype) -> None:
        self.dtype = dtype
        self.largest_token = 0
        self._digest = hashlib.sha256()
        self._counts = {"tokens": 0, "documents": 0, "text_bytes": 0}
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def tokens(self) -> int:
        return self._counts["tokens"]

    def append(self, tokens: Tokens, text_bytes: int = 0) -> None:
        """Append one document (or a piece of a token file, which has no `text_bytes`)."""
        content = tokens.astype(_on_disk(self.dtype)).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.largest_token = max(self.largest_token, int(tokens.max(initial=0)))
        for name, amount in (("tokens", len(tokens)), ("documents", 1), ("text_bytes", text_bytes)):
            self._counts[name] += amount

    def shard(self, of_text: bool) -> Shard:
        """Say what was written; documents and bytes of text are known only for text."""
        known = self._counts if of_text else {"tokens": self._counts["tokens"], "documents": None, "text_bytes": None}
        return Shard(**known, sha256=self._digest.hexdigest())


def shard_path(folder: Path, split: Split) -> Path:
    return folder / f"{split}.bin"


def smallest_dtype(vocab_size: int) -> Dtype:
    if vocab_size <= 1 << 8:
        return "uint8"
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_index(folder: Path, index: ShardIndex) -> None:
    write_json(_index_path(folder), index.model_dump())


def read_index(folder: Path) -> ShardIndex:
    """Read the index and check the sizes of the shards; in small corpora also their content, once in a process.

    Raises: ValueError, one line naming the damaged or unreadable file and what to do.
    """
    path = _index_path(folder)
    with reading(path):
        try:
            index = ShardIndex.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            raise _damaged(path, "missing, or not a whole index") from None
    for split in SPLITS:
        _check_size(shard_path(folder, split), index.shard(split).tokens * np.dtype(index.dtype).itemsize)
    if index.shards_bytes <= _CHEAP_BYTES:
        _verify_once(folder, index)
    return index


def open_shard(folder: Path, split: Split) -> Tokens:
    """Map the tokens of a split into memory, read-only."""
    index = read_index(folder)
    path = shard_path(folder, split)
    with reading(path):
        tokens: Tokens = np.memmap(path, _on_disk(index.dtype), mode="r")
    return tokens


def _verify(folder: Path, index: ShardIndex) -> None:
    for split in SPLITS:
        path = shard_path(folder, split)
        with reading(path), path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index.shard(split).sha256:
                raise _damaged(path, "its content is not what was written")


_verify_once = cache(_verify)


def _check_size(path: Path, bytes_written: int) -> None:
    if not path.is_file():
        raise _damaged(path, "missing")
    if (size := path.stat().st_size) != bytes_written:
        raise _damaged(path, f"{size} bytes where {bytes_written} were written")


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: {what}; the prepared corpus is damaged: remove the folder {path.parent}, it is built again"
    )


def _on_disk(dtype: Dtype) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def _index_path(folder: Path) -> Path:
    return folder / "index.json"
