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
    good = Version(python) >= Version("3.11")
    findings = [
        Finding("python", python, uniform=True)
        if good
        else Finding(
            "python", python, "missing", "create the environment with Python 3.11: make PYTHON=python3.11"
        )
    ]
    for requirement in map(Requirement, REQUIREMENTS):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            remedy = f"run pip install '{requirement}' in this environment"
            findings.append(Finding(requirement.name, "not installed", "missing", remedy))
            continue
        findings.append(version(requirement, found))
    return findings


def version(requirement: Requirement, found: str) -> Finding:
    """Check the installed version of one package."""
    if found in MALWARE.get(requirement.name, ()):
        remedy = (
            f"this release contained malware: install '{requirement}' and renew all secrets of this machine"
        )
        return Finding(requirement.name, found, "missing", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, found, "missing", f"run pip install '{requirement}'")
    return Finding(requirement.name, found, uniform=True)
