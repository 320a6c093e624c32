"""How a process of several ends: only once the communication threads have let go of what they hold."""

import time

import torch.distributed as dist

#: Seconds; a thread that waits for the interpreter's lock needs a few milliseconds of it.
SETTLE_S = 0.2


def settle_processes() -> None:
    """Give gloo's threads the time to drop the tensors of their last collectives; for ``atexit``.

    A thread that drops one while the interpreter ends is made to exit inside a C++ destructor, which aborts the
    process: SIGABRT, "terminate called without an active exception", after the work was done and said. A program
    that ended right after its last collective died so in 8 of 40 runs. Destroying the groups does not join these
    threads as long as a device mesh refers to them (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(SETTLE_S)  # the interpreter's lock is free meanwhile
