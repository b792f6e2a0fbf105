"""Errors that users read: one line that names the key, file or value, and what is allowed."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
"""What wrong input raises; the command line shows these as one line."""
EXIT_USER_ERROR = 2


class RunError(RuntimeError):
    """Ends a run although the input is right, such as a process that is gone: one line, exit code 1, worth a new try."""


@contextlib.contextmanager
def system_errors_of(what: str) -> Iterator[None]:
    """Turn what the system refuses inside (a full disk, a read-only one) into an error of ``what`` that a user mends.

    Raises:
        ValueError: For every OSError that is not in ``USER_ERRORS``.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, USER_ERRORS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise ValueError(f"{what}: {error.strerror or one_line(error)}{where}") from error


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name``, None if none is much like it."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return found[0] if found else None


def not_one_of(key: str, value: object, known: Iterable[str]) -> ValueError:
    """The error for a value that is none of the known ones."""
    known = list(known)
    near = nearest(value, known)
    hint = f" (did you mean {near!r}?)" if near else ""
    return ValueError(f"{key} must be one of {', '.join(known)}, got {value!r}{hint}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not known, with the nearest known one."""
    known = sorted(known)
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}")


def one_line(error: BaseException) -> str:
    """The text of an error on one line, its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def visible(text: str) -> str:
    """A text with everything written out that a terminal would act on, such as control characters; line breaks stay."""
    return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in text)


def short(value: object, width: int = 60) -> str:
    """``repr`` of a value on one line of at most ``width`` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
