"""The git commit of the running code."""

import subprocess
from pathlib import Path


def git_commit() -> str:
    """Return the git commit of the running code.

    The commit is followed by "-dirty" if there are local changes. If the code is not in a checkout, "unknown" is
    returned.
    """
    git, here = ("git", "-C", str(Path(__file__).parent)), Path(__file__).name
    try:  # the package may be installed inside the checkout of a different project
        subprocess.run([*git, "ls-files", "--error-unmatch", here], capture_output=True, check=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
