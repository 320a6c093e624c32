"""The Slurm of this machine, if there is one."""

import functools
import shutil
import subprocess


@functools.cache
def slurm_answers():
    """Return whether Slurm is installed and its controller responds."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return False
    return subprocess.run(["timeout", "20", "sinfo", "-h"], capture_output=True, check=False).returncode == 0


def idle_nodes():
    """Return the names of idle nodes; an empty list without a working Slurm."""
    if not slurm_answers():
        return []
    command = ["timeout", "20", "sinfo", "-hN", "-t", "idle", "-o", "%N"]
    return sorted(set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()))
