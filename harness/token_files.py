"""Pre-tokenised `.bin` files of 16-bit tokens, as nanoGPT and modded-nanogpt write them.

nanoGPT writes bare little-endian tokens; modded-nanogpt puts 256 32-bit numbers before them, of which the first three
are a magic number, the version and the number of tokens. Files with `val` in their name are for validation, all others
for training; without any, the last `validation_share` of the tokens, in the order of the names, is for validation.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.documents import SourceFile
from harness.shards import Split
from harness.user_files import reading

_MAGIC, _VERSION = 20240520, 1
_HEADER_BYTES = 256 * 4
_PIECE_TOKENS = 1 << 24


def token_pieces(files: list[SourceFile], validation_share: float) -> Iterator[tuple[Split, NDArray[np.uint16]]]:
    """Read the files in order, in pieces that fit into memory.

    Raises: ValueError naming a file that is no token file or is not whole.
    """
    named = [(_split_by_name(file), read_tokens(file.path)) for file in files]
    if all(split == "train" for split, _ in named):
        yield from _split_by_position([tokens for _, tokens in named], validation_share)
        return
    for split, tokens in named:
        yield from ((split, piece) for piece in _pieces(tokens))


def read_tokens(path: Path) -> NDArray[np.uint16]:
    """Map the tokens of one file, with or without a header, into memory.

    Raises: ValueError naming the file when it cannot be read, is no token file or is not whole.
    """
    with reading(path):
        return _mapped(path, path.stat().st_size)


def _mapped(path: Path, size: int) -> NDArray[np.uint16]:
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes are no file of 16-bit tokens; it is corrupt or of another format")
    header = np.fromfile(path, np.dtype("<i4"), count=min(3, size // 4))
    if header.size < 3 or header[0] != _MAGIC:
        return np.memmap(path, np.dtype("<u2"), mode="r")
    tokens_there = max(0, size - _HEADER_BYTES) // 2
    _check_header(path, version=int(header[1]), tokens=int(header[2]), tokens_there=tokens_there)
    return np.memmap(path, np.dtype("<u2"), mode="r", offset=_HEADER_BYTES)


def _check_header(path: Path, version: int, tokens: int, tokens_there: int) -> None:
    if version != _VERSION:
        raise ValueError(f"{path}: token file of version {version}; only version {_VERSION} (16-bit tokens) is known")
    if tokens <= 0 or tokens != tokens_there:
        raise ValueError(f"{path}: its header says {tokens} tokens, there are {tokens_there}; fetch the file again")


def _split_by_name(file: SourceFile) -> Split:
    return "validation" if "val" in file.path.name.lower() else "train"


def _split_by_position(
    arrays: list[NDArray[np.uint16]], validation_share: float
) -> Iterator[tuple[Split, NDArray[np.uint16]]]:
    train_left = sum(map(len, arrays)) - round(sum(map(len, arrays)) * validation_share)
    for tokens in arrays:
        yield from (("train", piece) for piece in _pieces(tokens[:train_left]))
        yield from (("validation", piece) for piece in _pieces(tokens[train_left:]))
        train_left = max(0, train_left - len(tokens))


def _pieces(tokens: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    return (tokens[start : start + _PIECE_TOKENS] for start in range(0, len(tokens), _PIECE_TOKENS))
