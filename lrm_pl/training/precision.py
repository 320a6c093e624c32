"""Supported values of ``trainer.precision``."""

import contextlib

import lightning as L
import torch

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import without_tf32

#: ``trainer.precision`` -> dtype of matrix products. Weights are always float32.
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": torch.float32}

#: Lightning's short names.
_SHORT = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def require_supported_precision(precision: str) -> str:
    """Check that a precision is supported.

    Cameras and compositing require float32, so precisions that store weights in a lower precision are not supported.

    Args:
        precision: Value of ``trainer.precision``.

    Returns:
        The full name of the precision, a key of ``DTYPES``.

    Raises:
        InputError: The precision is not supported.
    """
    precision = _SHORT.get(precision, precision)
    if precision not in DTYPES:
        raise InputError(
            expected=f"trainer.precision {', '.join(list(DTYPES)[:-1])} or {list(DTYPES)[-1]}",
            found=precision,
            remedy="use bf16-mixed for float32 weights and bfloat16 matrix products",
        )
    return precision


class DisableTF32(L.Callback):
    """Disable TF32 in cuDNN convolutions while a trainer with precision "32-true" runs.

    PyTorch enables TF32 in convolutions by default. The callback has no effect with other precisions, or if
    ``torch.set_float32_matmul_precision`` was called with a precision other than "highest".
    """

    def __init__(self) -> None:
        self._running = contextlib.ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disable TF32."""
        if trainer.precision == "32-true" and torch.get_float32_matmul_precision() == "highest":
            self._running.enter_context(without_tf32())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the TF32 setting."""
        self._running.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the TF32 setting, because Lightning does not call ``teardown`` after an exception."""
        self._running.close()
