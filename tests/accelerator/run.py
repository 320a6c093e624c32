"""Run the command line on a CPU with the branches for accelerators (``python -m tests.accelerator.run fit ...``)."""

from lrm_pl.__main__ import main
from lrm_pl.kernels.device import as_accelerator

if __name__ == "__main__":
    with as_accelerator():
        main()
