"""The one exception for input that a user can put right, and how its message says things."""

MOST = 2000  # characters of a message; what is longer loses its middle


class InputError(ValueError):
    """Bad input, refused before work starts.

    The message is one that a program can print as it is: what was found, where, and what to do.
    Names and values of files come in it, so whatever a terminal would obey is escaped, and what is
    too long is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(cut("".join(map(_printable, message)), MOST))


def brief(value: object, most: int = 200) -> str:
    """A value (its repr), or what an exception says, on one line of at most so many characters."""
    if not isinstance(value, Exception):
        try:
            return cut(repr(value), most)
        except (ValueError, RecursionError):  # an integer of 5000 digits, a list of 10^5 lists
            return f"a {type(value).__name__} beyond printing"
    if isinstance(value, MemoryError):
        return "it wants more memory than there is"
    if isinstance(value, RecursionError):
        return "it is nested too deeply"
    try:
        text = str(value)
    except Exception:  # some libraries' own __str__ fails
        text = ""
    text = " ".join("".join(map(_printable, text)).replace("\n", " ").split())
    return cut(text, most) or type(value).__name__


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number and what it is of: 1 feature, 1,800 features; `nouns` where that is not noun + s."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def cut(text: str, most: int) -> str:
    """The text, its middle left out where it is longer."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def _printable(character: str) -> str:
    if character.isprintable() or character == "\n":
        return character
    return character.encode("unicode_escape").decode()
