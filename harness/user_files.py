"""Paths that a user wrote: what is not there or cannot be read is a ValueError of one line."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def user_path(given: str, key: str) -> Path:
    """Return the absolute path; `key` is where it was given. Raises: ValueError for the home of an unknown user."""
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{key}: the home folder of {given} is not known; write the path in full") from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusal to read `path` into a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); make it readable, or leave it out") from None


def one_line(message: object) -> str:
    """Return what another package or a file says, fit for the middle of an error's line."""
    return textwrap.shorten(str(message), width=300, placeholder=" …")
