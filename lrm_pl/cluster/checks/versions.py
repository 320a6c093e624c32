"""Versions of Python and of the packages without which nothing trains; imports none of them."""

import importlib.metadata
import platform

from packaging.requirements import Requirement
from packaging.version import Version

from lrm_pl.cluster.checks.finding import Finding

#: The versions without which nothing trains, as in pyproject.toml (a test compares them).
REQUIREMENTS = ("torch>=2.14", "torchvision>=0.29", "lightning>=2.6.6")
#: Releases that were malware: having had one matters more than its version.
MALWARE = {"lightning": ("2.6.2", "2.6.3")}


def versions() -> list[Finding]:
    """Compare versions with what this project needs."""
    python = platform.python_version()
    good = Version(python) >= Version("3.11")
    findings = [
        Finding("python", python, alike=True)
        if good
        else Finding(
            "python", python, "missing", "make the environment with Python 3.11: make PYTHON=python3.11"
        )
    ]
    for requirement in map(Requirement, REQUIREMENTS):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install '{requirement}' in the environment that runs this"
            findings.append(Finding(requirement.name, "not installed", "missing", remedy))
            continue
        findings.append(version(requirement, found))
    return findings


def version(requirement: Requirement, found: str) -> Finding:
    """Judge the version of one package."""
    if found in MALWARE.get(requirement.name, ()):
        remedy = (
            f"that release was malware: install '{requirement}' and renew every secret this machine has held"
        )
        return Finding(requirement.name, found, "missing", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, found, "missing", f"pip install '{requirement}'")
    return Finding(requirement.name, found, alike=True)
