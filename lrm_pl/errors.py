"""The base class of expected errors, and counts in messages."""


class InputError(ValueError):
    """A config, command, file or folder cannot be used. Programs print its message without a traceback.

    Any other exception is a bug and keeps its traceback.

    Args:
        expected: What is needed; the whole message if nothing else is given.
        found: What was given instead.
        remedy: What to do about it.
        subject: What the error is about, for example a path.

    Attributes:
        problem: The message without the remedy.
    """

    def __init__(self, expected: object, found: object = "", remedy: str = "", subject: object = "") -> None:
        self.expected, self.found, self.remedy, self.subject = expected, found, remedy, subject
        message = f"expected {expected}, but found {found}" if found != "" else str(expected)
        self.problem = f"{subject}: {message}" if subject != "" else message
        super().__init__(f"{self.problem}. {remedy[0].upper()}{remedy[1:]}" if remedy else self.problem)

    def __str__(self) -> str:
        """Return the message without the traceback that a DataLoader prepends to a worker's error."""
        message = super().__str__()
        return message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip()


def counted(number: int, noun: str) -> str:
    """Write a number of things: ``1 shard``, ``2 shards``, ``2 processes``, ``2 meshes``."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "sh")) else "s")
