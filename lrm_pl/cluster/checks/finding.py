"""What one check found on one node."""

import dataclasses
from typing import Literal

from lrm_pl.errors import InputError

Verdict = Literal["ok", "warning", "missing"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        check: What was looked at.
        found: What is there.
        verdict: "missing" means that the run cannot do without.
        remedy: What to do unless all is well.
        alike: Whether every node must find the same.
    """

    check: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    alike: bool = False

    def __post_init__(self) -> None:
        """Hold each verdict but "ok" to a remedy."""
        assert (self.verdict == "ok") == (not self.remedy), self

    @classmethod
    def from_error(cls, check: str, error: InputError) -> "Finding":
        """Return the row of a check that failed with an expected error."""
        return cls(check, error.problem, "missing", error.remedy or "correct it and run again")
