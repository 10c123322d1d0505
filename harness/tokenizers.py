"""Text to tokens: bytes as they are, or a tokenizer read from a file given by path. Nothing is downloaded.

Every tokenizer has a separator, put after each document: token 0 for bytes and ascii, else the tokenizer's end of text.
"""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import CorpusConfig
from harness.shards import Tokens
from harness.user_files import one_line, reading, user_path

#: Split patterns of byte-pair encodings, in the form in which they were published; a rank file does not hold its own.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERN_BY_RANKS = {
    50_256: ("gpt2", _GPT2_PATTERN),
    50_280: ("gpt2", _GPT2_PATTERN),
    199_998: ("o200k", _O200K_PATTERN),
}

#: Names under which tokenizer.json files keep their end of text, first found first taken.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """A function from text to tokens; `identity` names it by content, so that equal identities give equal tokens."""

    identity: str
    vocab_size: int
    separator: int
    encode: Callable[[bytes], Tokens]


def tokenizer_file(config: CorpusConfig) -> Path | None:
    """Return the file that the tokenizer is read from; None for bytes and ascii.

    Raises: ValueError when it is not given, does not exist, or is given where it means nothing.
    """
    if config.tokenizer in ("bytes", "ascii"):
        if config.tokenizer_path is not None:
            raise ValueError(
                f"corpus.tokenizer_path has no meaning for tokenizer {config.tokenizer}; "
                f"set corpus.tokenizer to tiktoken or tokenizers, or remove the path"
            )
        return None
    wanted = "a rank file (.tiktoken)" if config.tokenizer == "tiktoken" else "a tokenizer.json"
    if config.tokenizer_path is None:
        raise ValueError(f"corpus.tokenizer_path is missing; tokenizer {config.tokenizer} needs {wanted} there")
    path = user_path(config.tokenizer_path, "corpus.tokenizer_path")
    with reading(path):
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise ValueError(f"corpus.tokenizer_path: {path} {what}; tokenizer {config.tokenizer} needs {wanted}")
    return path


def load_tokenizer(config: CorpusConfig) -> Tokenizer:
    """Make the tokenizer. Raises: ValueError for a missing file or package, or a file of another format."""
    path = tokenizer_file(config)
    if path is None:
        return _bytes() if config.tokenizer == "bytes" else _ascii()
    with reading(path):
        content = path.read_bytes()
    return _tiktoken(path, content) if config.tokenizer == "tiktoken" else _tokenizers(path, content)


def _bytes() -> Tokenizer:
    return Tokenizer("bytes", vocab_size=256, separator=0, encode=lambda text: np.frombuffer(text, np.uint8))


def _ascii() -> Tokenizer:
    """Fold what is not ASCII into the symbol 127: min(byte, 127)."""
    fold = np.minimum(np.arange(256), 127).astype(np.uint8)
    return Tokenizer("ascii", vocab_size=128, separator=0, encode=lambda text: fold[np.frombuffer(text, np.uint8)])


def _tiktoken(path: Path, content: bytes) -> Tokenizer:
    """Read a rank file: on each line a token in base 64 and its rank.

    The split pattern is chosen by the number of ranks, which tells the published encodings apart: 50,256 and 50,280
    GPT-2's, 199,998 that of o200k, any other number that of cl100k. End of text is the first number after the ranks.
    """
    try:
        from tiktoken import Encoding
    except ImportError:
        raise _missing_package("tiktoken") from None
    ranks = _parse_ranks(path, content)
    pattern_name, pattern = _PATTERN_BY_RANKS.get(len(ranks), ("cl100k", _CL100K_PATTERN))
    encoding = Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    separator = max(ranks.values()) + 1
    return Tokenizer(
        identity=f"tiktoken {pattern_name} {_sha256(content)}",
        vocab_size=separator + 1,
        separator=separator,
        encode=lambda text: np.array(encoding.encode_ordinary(_decode(text)), np.uint32),
    )


def _tokenizers(path: Path, content: bytes) -> Tokenizer:
    """Read a tokenizer.json. The vocabulary reaches to its largest number, whether or not all below are taken.

    A length to cut or fill to, which such a file may hold, is not for documents; and a special token's name within a
    text (`</s>` in HTML) is text.
    """
    try:
        from tokenizers import Tokenizer as FromFile
    except ImportError:
        raise _missing_package("tokenizers") from None
    try:
        model = FromFile.from_buffer(content)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json ({one_line(error)})") from None
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    vocabulary: dict[str, int] = model.get_vocab(with_added_tokens=True)
    separator = next((vocabulary[name] for name in _END_OF_TEXT if name in vocabulary), None)
    if separator is None:
        raise ValueError(
            f"{path}: has no end-of-text token to separate documents; wanted one of {', '.join(_END_OF_TEXT)}"
        )
    return Tokenizer(
        identity=f"tokenizers {_sha256(content)}",
        vocab_size=max(vocabulary.values()) + 1,
        separator=separator,
        encode=lambda text: np.array(model.encode(_decode(text), add_special_tokens=False).ids, np.uint32),
    )


def _parse_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    try:
        pairs = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{path}: not a rank file; each line must be a token in base 64 and its rank") from None
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise ValueError(
            f"{path}: {missing} of the 256 single bytes have no rank; the file is truncated or no rank file"
        )
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0 or max(ranks.values()) >= 1 << 31:
        raise ValueError(
            f"{path}: not a rank file; its ranks {min(ranks.values())} to {max(ranks.values())} must differ, "
            f"start at 0 and stay below 2^31"
        )
    return ranks


def _decode(text: bytes) -> str:
    return text.decode(errors="replace")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _missing_package(name: str) -> ValueError:
    return ValueError(f"tokenizer {name} needs the extra: python -m pip install 'critbatch[tokenizers]'")
