"""Why a run failed, in four kinds, and the file that says so; imports no torch."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum

from harness.origin import host_name, job_id
from harness.record import RunFolder, write_json
from harness.user_files import one_line

_LOG_LINES_KEPT = 20

#: How PyTorch says that memory ran out, where it has no exception of its own (its CUDA one has these words too).
_MEMORY_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "STATUS_ALLOC_FAILED")

#: The system refuses to write: disk full, over quota, mounted read-only, not allowed.
_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class FailureKind(StrEnum):
    """What kind of thing went wrong: want of memory, the corpus (gone, changed, cut short), an exception of the code,
    or other (killed from outside).
    """

    OUT_OF_MEMORY = "out_of_memory"
    DATA = "data"
    CODE = "code"
    OTHER = "other"


class DataError(ValueError):
    """The corpus is gone, has changed or was cut short."""


class TooLargeError(RuntimeError):
    """Memory ran out, and no smaller micro-batch may be tried; the message has the advice."""


@contextmanager
def reading_the_corpus() -> Iterator[None]:
    """Turn what is wrong with the corpus into a DataError."""
    try:
        yield
    except ValueError as error:
        raise DataError(str(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the device or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)
    )


def is_unwritable(error: BaseException) -> bool:
    """Tell whether the system refused to write."""
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


def kind_of(error: BaseException) -> FailureKind:
    if isinstance(error, TooLargeError) or is_out_of_memory(error):
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.DATA if isinstance(error, DataError) else FailureKind.CODE


def reason_of(error: BaseException) -> str:
    """Return the error in one line; what a user can act on speaks for itself, the rest is named by its type."""
    text = one_line(error) or type(error).__name__
    return text if isinstance(error, ValueError | TooLargeError) else one_line(f"{type(error).__name__}: {text}")


def write_failure(run: RunFolder, reason: str, kind: FailureKind) -> None:
    """Write why a run failed and where, with the last lines of its log."""
    lines = run.log.read_text(errors="replace").splitlines() if run.log.exists() else []
    content = {
        "reason": reason,
        "kind": kind,
        "failed_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host_name(),
        "job_id": job_id(),
        "last_lines": lines[-_LOG_LINES_KEPT:],
    }
    write_json(run.failure, content)
