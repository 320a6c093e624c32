"""Start and check runs on several processes and nodes: Slurm, torchrun, ``lrm launch`` and ``lrm doctor``."""
