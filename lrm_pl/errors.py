"""The one base of expected errors: what a user gave cannot be used; numbers of things in messages."""


class InputError(ValueError):
    """A config, a command, a file or a folder cannot be used: what was expected, what was found, what to do.

    Programs end with its message alone. Any other exception is a mistake of this project's own, and keeps its
    traceback.
    """


def counted(number: int, noun: str) -> str:
    """Write a number of things: ``1 shard``, ``2 shards``, ``2 processes``, ``2 meshes``."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "sh")) else "s")
