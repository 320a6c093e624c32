"""Run ``python -m tests.fused.twin fit ...`` with the reference implementation of the fused decoder."""

from lrm_pl.__main__ import main
from lrm_pl.kernels.device import as_accelerator
from lrm_pl.rendering import fused

if __name__ == "__main__":
    fused.triton_unavailable = lambda device: None
    with as_accelerator():
        main()
