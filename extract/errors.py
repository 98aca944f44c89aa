"""The one exception for input that a user can put right, and how its message says things."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

MOST = 2000  # characters of a message; what is longer loses its middle


class InputError(ValueError):
    """Bad input, refused before work starts: what was found, where, and what to do.

    Names and values of files come in it, so whatever a terminal would obey is escaped, and what is
    too long is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_cut("".join(map(_printable, message)), MOST))


def counted(number: int, noun: str) -> str:
    """A number and what it is of: 1 cell, 1,800 cells."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def listed(names: object, most: int = 5) -> str:
    """The first names and how many more there are, for a message of one line."""
    names = [one_line(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(value: object, most: int = 200) -> str:
    """A text, or what an exception says, on one line of at most so many characters."""
    if isinstance(value, MemoryError):
        return "it wants more memory than there is"
    if isinstance(value, RecursionError):
        return "it is nested too deeply"
    text = " ".join("".join(map(_printable, str(value))).replace("\n", " ").split())
    return _cut(text, most) or (type(value).__name__ if isinstance(value, Exception) else "")


@contextlib.contextmanager
def reading(what: str | os.PathLike[str], why: str = "cannot be read") -> Iterator[None]:
    """Whatever a broken file raises, as an InputError of one line that names `what`."""
    try:
        yield
    except InputError as error:
        if os.fspath(what) in str(error):
            raise
        raise InputError(f"{what}: {error}") from None
    except Exception as error:  # libraries raise dozens of kinds at what they did not write
        raise InputError(f"{what} {why}: {one_line(error)}") from error


def check_file(path: Path) -> None:
    """Refuse what is no file: nothing at all, a folder, a pipe, which would be waited for."""
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise InputError(f"there is no {path}; its folder holds {listed(there, 10) or 'nothing'}")


def _cut(text: str, most: int) -> str:
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def _printable(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode()
