"""Run a module in a separate process with Triton's interpreter."""

import os
import subprocess
import sys

from tests import ROOT


def interpreted(module, *arguments, interpret="1", limit_s=280):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=limit_s,
        env={**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
