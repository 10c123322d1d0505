"""A corpus ready for training: text made into token shards once, kept in a cache, named by a fingerprint.

The cache is keyed by the configuration and the size and time of every source file: nothing is read again while nothing
has changed. Shards are built under a lock, in a folder that gets its name when it is complete. Imports no torch.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import CorpusConfig, RunConfig
from harness.documents import SourceFile, documents, source_files, split_rule
from harness.shards import (
    SPLITS,
    Dtype,
    ShardIndex,
    ShardWriter,
    Split,
    read_index,
    shard_path,
    smallest_dtype,
    write_index,
)
from harness.token_files import token_pieces
from harness.tokenizers import load_tokenizer, tokenizer_file
from harness.user_files import reading, user_path

#: Raised when the same source would give other shards.
_FORMAT = 1


@dataclass(frozen=True)
class Corpus:
    """Shards in `folder`, read with `harness.shards.open_shard`.

    `bytes_per_token` is of the validation text, separators counted as tokens; None where the source came as tokens.
    """

    folder: Path
    fingerprint: str
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    bytes_per_token: float | None


def prepare(config: CorpusConfig, cache: Path | None = None) -> Corpus:
    """Return the corpus, building its shards when the cache does not hold them yet.

    `cache` is by default $CRITBATCH_CACHE, else critbatch in the user's cache folder.

    Raises: ValueError for what is missing, empty, unreadable or damaged, or is not what `fingerprint` and
    `vocab_size` say, and for a cache that cannot be written.
    """
    files = source_files(config)
    cache = cache or default_cache()
    folder = cache / _folder_name(config, files)
    with _writing(cache):
        if not folder.exists():
            with _locked(folder.with_suffix(".lock")):
                if not folder.exists():
                    _build(config, files, folder)
    return _checked(config, read_index(folder), folder)


def check_budget(corpus: Corpus, run: RunConfig) -> None:
    """Raise ValueError when the run asks for more text than there is, for training or for evaluation."""
    length = run.model.sequence_length
    windows = count_windows(corpus.train_tokens, length)
    needed_windows = run.realized_tokens // length
    if needed_windows > windows * run.corpus.max_epochs:
        epochs = needed_windows / max(windows, 1)
        raise ValueError(
            f"the run needs {run.realized_tokens} tokens, {epochs:.2f} epochs of the {windows * length} "
            f"in the training split; corpus.max_epochs allows {run.corpus.max_epochs:g}: lower token_budget, "
            f"take a larger corpus (corpus.paths, corpus.max_tokens), or raise corpus.max_epochs"
        )
    count_evaluation_windows(corpus, run)


def count_windows(tokens: int, sequence_length: int) -> int:
    """Count the windows of sequence_length + 1 tokens that start every `sequence_length` tokens."""
    return max(0, (tokens - 1) // sequence_length)


def count_evaluation_windows(corpus: Corpus, run: RunConfig) -> int:
    """Return how many windows an evaluation reads.

    Raises: ValueError when evaluation.tokens is no whole number of sequences or more than the validation split holds.
    """
    length, tokens = run.model.sequence_length, run.evaluation.tokens
    if tokens % length:
        raise ValueError(
            f"evaluation.tokens {tokens} is not a whole number of sequences of {length} tokens ({tokens / length:g}); "
            f"the nearest are {tokens // length * length or length} and {tokens // length * length + length}"
        )
    available = count_windows(corpus.validation_tokens, length)
    if tokens > available * length:
        raise ValueError(
            f"evaluation.tokens {tokens} is more than the {available * length} of the validation split; "
            f"lower it, or raise corpus.validation_share or the size of the corpus"
        )
    return tokens // length


def default_cache() -> Path:
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get("CRITBATCH_CACHE") or f"{user_cache}/critbatch", "CRITBATCH_CACHE")


def _folder_name(config: CorpusConfig, files: list[SourceFile]) -> str:
    """Name the configuration and the state of every file that the shards are made from."""
    settings = config.model_dump(mode="json", exclude={"max_epochs", "fingerprint", "vocab_size"})
    tokenizer = tokenizer_file(config)
    inputs = [(file.name, file.path) for file in files] + ([("", tokenizer)] if tokenizer else [])
    states = [(name, os.fsencode(path).hex(), _size_and_time(path)) for name, path in inputs]
    return f"{config.source}-{config.tokenizer}-{_digest(_FORMAT, settings, states)}"


def _size_and_time(path: Path) -> tuple[int, int]:
    with reading(path):
        state = path.stat()
    return state.st_size, state.st_mtime_ns


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a ValueError; what cannot be read has become one before."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the corpus cache {cache} cannot be written ({error.strerror}); "
            f"set CRITBATCH_CACHE to a folder that can, with room for the tokens"
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; wait for another process that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(config: CorpusConfig, files: list[SourceFile], folder: Path) -> None:
    """Write shards and index under another name, then rename."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _remove_abandoned(folder.parent)
    partial.mkdir()
    try:
        index = _write_tokens(config, files, partial) if config.source == "bin" else _write_text(config, files, partial)
        _check_splits(config, index, len(files))
        write_index(partial, index)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove what killed processes left of other corpora: a build that still goes on holds its lock."""
    for partial in cache.glob("*.partial"):
        with suppress(OSError), partial.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial)


def _write_text(config: CorpusConfig, files: list[SourceFile], folder: Path) -> ShardIndex:
    """Write documents, each followed by the separator; empty ones and those with a NUL byte (no text) are left out."""
    tokenizer = load_tokenizer(config)
    left_out = 0
    with _writers(folder, smallest_dtype(tokenizer.vocab_size)) as writers:
        for split, text in documents(config, files):
            if not text or b"\0" in text:
                left_out += 1
                continue
            tokens = tokenizer.encode(text)
            writers[split].append(np.append(tokens, tokens.dtype.type(tokenizer.separator)), text_bytes=len(text))
            if config.max_tokens is not None and writers["train"].tokens >= config.max_tokens:
                break
    return _index(
        config,
        writers,
        tokenizer=tokenizer.identity,
        vocab_size=tokenizer.vocab_size,
        split_rule=split_rule(config, files),
        left_out=left_out,
    )


def _write_tokens(config: CorpusConfig, files: list[SourceFile], folder: Path) -> ShardIndex:
    """Copy token files; their vocabulary is taken to reach to the largest token."""
    with _writers(folder, "uint16") as writers:
        for split, tokens in token_pieces(files, config.validation_share):
            writers[split].append(tokens)
    vocab_size = 1 + max(writer.largest_token for writer in writers.values())
    rule = f"files with val in their name, else the last {config.validation_share:g} of the tokens"
    return _index(config, writers, tokenizer="not known", vocab_size=vocab_size, split_rule=rule, left_out=0)


@contextmanager
def _writers(folder: Path, dtype: Dtype) -> Iterator[dict[Split, ShardWriter]]:
    with (
        ShardWriter(shard_path(folder, "train"), dtype) as train,
        ShardWriter(shard_path(folder, "validation"), dtype) as validation,
    ):
        yield {"train": train, "validation": validation}


def _index(
    config: CorpusConfig,
    writers: dict[Split, ShardWriter],
    *,
    tokenizer: str,
    vocab_size: int,
    split_rule: str,
    left_out: int,
) -> ShardIndex:
    train, validation = (writers[split].shard(of_text=config.source != "bin") for split in SPLITS)
    dtype = writers["train"].dtype
    version = f" {platform.python_version()}" if config.source == "python-stdlib" else ""
    return ShardIndex(
        source=config.source + version,
        tokenizer=tokenizer,
        split_rule=split_rule,
        fingerprint=_digest(tokenizer, split_rule, dtype, train.sha256, validation.sha256),
        vocab_size=vocab_size,
        dtype=dtype,
        left_out_documents=left_out,
        train=train,
        validation=validation,
    )


def _check_splits(config: CorpusConfig, index: ShardIndex, num_files: int) -> None:
    if not index.train.tokens and not index.validation.tokens:
        left_out = f" ({index.left_out_documents} are empty or hold a NUL byte)" if index.left_out_documents else ""
        raise ValueError(f"corpus {_described(config)} has no documents{left_out}; give files that hold text")
    is_split_by_path = config.source == "text" and num_files > 1 and config.max_tokens is None
    if is_split_by_path and not (index.train.tokens and index.validation.tokens):
        fell, change = ("all", "lower") if index.validation.tokens else ("none", "raise")
        raise ValueError(
            f"corpus {_described(config)}: {fell} of the {num_files} files fell into the "
            f"{100 * config.validation_share:g} % kept for validation; {change} corpus.validation_share, "
            "or join them into one file, which is split by position"
        )
    more = "" if config.max_tokens is None else f", or raise corpus.max_tokens from {config.max_tokens}"
    for split in SPLITS:
        if not index.shard(split).tokens:
            raise ValueError(
                f"corpus {_described(config)}: the {split} split is empty ({index.split_rule}); "
                f"give more documents, smaller ones, or another corpus.validation_share{more}"
            )


def _checked(config: CorpusConfig, index: ShardIndex, folder: Path) -> Corpus:
    if config.fingerprint not in (None, index.fingerprint):
        raise ValueError(
            f"corpus {_described(config)} has the fingerprint {index.fingerprint}, the configuration says "
            f"{config.fingerprint}: text, tokenizer or split changed since; restore them, or remove corpus.fingerprint"
        )
    vocab_size = config.vocab_size or index.vocab_size
    if vocab_size < index.vocab_size or (vocab_size > index.vocab_size and config.source != "bin"):
        raise ValueError(
            f"corpus.vocab_size {vocab_size} is given, but the tokens of the corpus are 0 to {index.vocab_size - 1}"
        )
    text_bytes = index.validation.text_bytes
    return Corpus(
        folder=folder,
        fingerprint=index.fingerprint,
        vocab_size=vocab_size,
        train_tokens=index.train.tokens,
        validation_tokens=index.validation.tokens,
        bytes_per_token=None if text_bytes is None else text_bytes / index.validation.tokens,
    )


def _described(config: CorpusConfig) -> str:
    return " ".join((config.source, *config.paths))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
