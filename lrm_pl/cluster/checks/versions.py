"""Checks of the versions of Python and the required packages. The packages are not imported."""

import importlib.metadata
import platform

from packaging.requirements import Requirement
from packaging.version import Version

from lrm_pl.cluster.checks.findings import Finding

#: Required versions. A test checks that they match pyproject.toml.
REQUIREMENTS = ("torch>=2.14", "torchvision>=0.29", "lightning>=2.6.6")
#: Releases that contained malware, by name of the package.
MALWARE = {"lightning": ("2.6.2", "2.6.3")}


def versions() -> list[Finding]:
    """Check the versions of Python and the required packages."""
    python = platform.python_version()
    outdated = "" if Version(python) >= Version("3.11") else "use Python 3.11: make PYTHON=python3.11"
    findings = [Finding("python", python, missing=outdated, uniform=True)]
    for requirement in map(Requirement, REQUIREMENTS):
        try:
            findings.append(version(requirement, importlib.metadata.version(requirement.name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(requirement.name, "not installed", f"run pip install '{requirement}'"))
    return findings


def version(requirement: Requirement, found: str) -> Finding:
    """Check the installed version of one package."""
    remedy = ""
    if found in MALWARE.get(requirement.name, ()):
        remedy = (
            f"run pip install '{requirement}' and renew all secrets of this machine, because this release contained "
            "malware"
        )
    elif not requirement.specifier.contains(found, prereleases=True):
        remedy = f"run pip install '{requirement}'"
    return Finding(requirement.name, found, missing=remedy, uniform=True)
