"""Which precisions a trainer may have, and what they mean on GPUs."""

import contextlib

import lightning as L
import torch

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import without_tf32

#: Type of products by the trainer's precision. Weights are float32 with all of them.
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}


#: Lightning's short names.
_SHORT = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def require_supported_precision(precision: str) -> str:
    """Refuse precisions whose weights are not float32: cameras, compositing and the optimizer need it.

    Args:
        precision: As in ``trainer.precision``.

    Returns:
        Its full name, a key of ``DTYPES``.

    Raises:
        InputError: It is one of these.
    """
    precision = _SHORT.get(precision, precision)
    if precision not in DTYPES:
        raise InputError(
            expected=f"trainer.precision {', '.join(DTYPES)}",
            found=precision,
            remedy="choose one of these: weights stay float32, and bf16-mixed computes products in bfloat16",
        )
    return precision


class Float32Convolutions(L.Callback):
    """Turn TF32 off for as long as a trainer with ``precision: 32-true`` runs.

    PyTorch lets cuDNN use TF32 by default; backward reads the switch too, so that all of the run is covered. Other
    precisions, and products that ``torch.set_float32_matmul_precision`` allows to be rounded, are left alone.
    """

    def __init__(self) -> None:
        self._running = contextlib.ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Turn it off."""
        if trainer.precision == "32-true" and torch.get_float32_matmul_precision() == "highest":
            self._running.enter_context(without_tf32())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore it."""
        self._running.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore it: Lightning does not call ``teardown`` then."""
        self._running.close()
