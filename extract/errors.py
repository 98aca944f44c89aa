"""The one exception for input that a user can put right."""


class InputError(ValueError):
    """Bad input, refused before work starts: what was found, where, and what to do."""


def listed(names: object, most: int = 5) -> str:
    """The first names and how many more there are, for a message of one line."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
