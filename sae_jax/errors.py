"""The one exception for input that a user can put right."""


class InputError(ValueError):
    """Bad input, refused before work starts.

    The message is one that a program can print as it is: what was found, where, and what to do.
    """
