"""The one base of expected errors: what a user gave cannot be used; numbers of things in messages."""


class InputError(ValueError):
    """A config, a command, a file or a folder cannot be used: what was expected, what was found, what to do.

    Programs end with its message alone. Any other exception is a mistake of this project's own, and keeps its
    traceback.
    """

    def __str__(self) -> str:
        """Return the message, without the traceback that a DataLoader puts before that of a worker's error."""
        message = super().__str__()
        return message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip()


def counted(number: int, noun: str) -> str:
    """Write a number of things: ``1 shard``, ``2 shards``, ``2 processes``, ``2 meshes``."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "sh")) else "s")
