"""The one base of expected errors: what a user gave cannot be used."""


class InputError(ValueError):
    """A config, a command, a file or a folder cannot be used: what was expected, what was found, what to do.

    Programs end with its message alone. Any other exception is a mistake of this project's own, and keeps its
    traceback.
    """
