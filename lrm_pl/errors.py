"""Base class of errors that users can fix, and functions that complete and print error messages."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """Error caused by an invalid configuration, command, file or folder.

    Commands print the message of this error or of an ``OSError`` without a traceback. Other exceptions indicate bugs
    and keep the traceback.

    Args:
        expected: Expected value as a noun phrase, or the complete message.
        found: Actual value as a noun phrase.
        remedy: Suggested fix as an imperative sentence.
        subject: Subject of the error, for example, a path.

    Attributes:
        problem: Message without the remedy.
    """

    def __init__(self, expected: object, found: object = "", remedy: str = "", subject: object = "") -> None:
        self.expected, self.found, self.remedy, self.subject = expected, found, remedy, subject
        message = f"expected {expected}, but found {found}" if found != "" else str(expected)
        self.problem = f"{subject}: {message}" if subject != "" else message
        super().__init__(f"{self.problem}. {remedy[0].upper()}{remedy[1:]}" if remedy else self.problem)

    def __str__(self) -> str:
        """Return the message without the traceback that a DataLoader prepends to the error of a worker."""
        message = super().__str__()
        return message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2].rstrip()


@contextmanager
def error_subject(subject: object) -> Iterator[None]:
    """Return a context manager that adds a subject, for example, a path, to an ``InputError`` that has no subject."""
    try:
        yield
    except InputError as error:
        if error.subject != "":
            raise
        raise type(error)(error.expected, error.found, error.remedy, subject) from error


def counted(number: int, noun: str) -> str:
    """Format a count with a noun, for example, ``1 shard``, ``2 shards``, ``2 processes`` or ``2 meshes``."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "sh")) else "s")


def exit_on_error(main: Callable[[Sequence[str]], None]) -> Callable[..., None]:
    """Decorate the main function of a command so that expected errors print a message and exit the process.

    Args:
        main: Function that is called with the arguments of the command. They default to ``sys.argv[2:]``, the arguments
            after the name of the command.
    """

    @functools.wraps(main)
    def run(arguments: Sequence[str] | None = None) -> None:
        try:
            main(sys.argv[2:] if arguments is None else arguments)
        except (InputError, OSError) as error:
            sys.exit(f"lrm: {error}")

    return run
