"""LightningModule that defines the training, validation, test and prediction steps and configures the optimizer."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.data.batch import Batch, Views
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.inference.scene import Scene
from lrm_pl.losses.objective import LossInputs, Objective
from lrm_pl.models.lrm import LRM
from lrm_pl.models.triplane import Triplane
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.gradient_guard import GradientGuard, GuardConfig
from lrm_pl.training.image_metrics import ImageMetricsLogger
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks, require_equal_weights, shard
from lrm_pl.training.precision import DisableTF32
from lrm_pl.training.sharded_state import state_access
from lrm_pl.training.step_logging import is_logged_step, log_global_step
from lrm_pl.training.supported import (
    require_builtin_optimizer,
    require_optimized_parameters,
    require_supported_length,
    require_supported_settings,
)
from lrm_pl.weights.encoders import pretrained_perceptual_loss

logger = logging.getLogger(__name__)

#: ``trainer.precision`` -> dtype in which sharded blocks are gathered and computed. None means float32.
SHARDED_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


@dataclasses.dataclass
class Prediction:
    """Rendered views of a batch.

    Attributes:
        images: (B, V, 3, H, W) rendered views in [0, 1], composited over the backgrounds of the requested views.
        rendering: Color, opacity and depth of the rendered views.
        triplane: Triplanes of the objects.
    """

    images: Float[Tensor, "B V 3 H W"]
    rendering: Rendering
    triplane: Triplane


class LRMModule(L.LightningModule):
    """Train an LRM with losses on rendered views of each object (LRM, section 3.4).

    Args:
        lrm: The network.
        renderer: The volume renderer.
        objective: The loss terms.
        optimizer: Settings of AdamW and of the learning rate schedule.
        parallel: Settings of activation checkpointing and compilation.
        guard: Criteria for skipping an optimizer step.
    """

    def __init__(
        self,
        lrm: LRM,
        renderer: Renderer,
        objective: Objective,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 - frozen
        guard: GuardConfig = GuardConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.lrm, self.renderer, self.objective, self.optimizer = lrm, renderer, objective, optimizer
        self.parallel, self.guard = parallel, GradientGuard(guard)
        self.current_sample_ids: tuple[str, ...] = ()  # samples of the newest step on this rank
        self._terms: list[dict[str, Tensor]] = []  # loss terms of accumulated batches
        self._configured = False

    def setup(self, stage: str) -> None:
        """Check the settings of the trainer, and load the LPIPS network if the objective needs it.

        Raises:
            InputError: A setting is not supported, a trainable parameter is not part of the network, or the weights of
                LPIPS are not available.
        """
        require_supported_settings(self.trainer)
        require_optimized_parameters(self, self.lrm)
        if stage == "fit":
            require_supported_length(self.trainer)
        if stage == "fit" and self.objective.lpips and self.objective.perceptual is None:
            loss = pretrained_perceptual_loss("vgg")
            self.objective.perceptual = loss.to(self.trainer.strategy.root_device)

    def configure_callbacks(self) -> list[L.Callback]:
        """Return ``DisableTF32`` and ``ImageMetricsLogger``, except for callbacks that the trainer already has."""
        existing = self.trainer.callbacks  # type: ignore[attr-defined]
        defaults: list[L.Callback] = [DisableTF32(), ImageMetricsLogger()]
        return [one for one in defaults if not any(isinstance(other, type(one)) for other in existing)]

    def on_fit_start(self) -> None:
        """Check that ``configure_optimizers`` is not overridden with a custom optimizer or schedule.

        Raises:
            InputError: The optimizer or the schedule was not created from the argument ``optimizer``.
        """
        require_builtin_optimizer(self.trainer)

    def on_train_start(self) -> None:
        """Set the learning rate of the first step, and log a warning if the encoder has no pretrained weights."""
        self._set_learning_rate(self.trainer.optimizers[0])
        if self.global_step == 0 and not self.lrm.encoder.has_weights and self.trainer.is_global_zero:
            logger.warning(
                "The encoder %s starts from random weights. To load pretrained weights, call "
                "encoder.load_pretrained(lrm_pl.weights.encoders.load_encoder_state(...))",
                self.lrm.encoder.name,
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> "LRMModule":  # type: ignore[override] # noqa: ANN401 - Lightning's
        """Load a Lightning checkpoint into a new module.

        Args:
            checkpoint_path: Path of a file written by ``Trainer.save_checkpoint``.
            **options: Arguments of this class and of ``LightningModule.load_from_checkpoint``. The arguments ``lrm``,
                ``renderer`` and ``objective`` are required.

        Raises:
            InputError: The path is a checkpoint written by ``CheckpointAndResume``.
        """
        if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_dir():
            raise InputError(
                expected="a file written by Trainer.save_checkpoint",
                found=f"the folder {checkpoint_path}",
                remedy=(
                    "for inference, use lrm_pl.LRMPipeline.from_pretrained(folder). To load the weights, use "
                    "lrm_pl.checkpoints.network.load_network"
                ),
            )
        return super().load_from_checkpoint(checkpoint_path, **options)

    def configure_model(self) -> None:
        """Apply activation checkpointing and compilation, and shard the network if the strategy has a device mesh.

        Repeated calls have no effect.

        Raises:
            InputError: The precision does not support sharding, or the weights differ between ranks.
        """
        if self._configured:
            return
        self._configured = True
        prepare_blocks(self.lrm, self.parallel)
        if self.device_mesh is not None:
            precision = str(self.trainer.precision)
            if precision not in SHARDED_PRECISIONS:
                raise InputError(
                    expected=f"trainer.precision {' or '.join(SHARDED_PRECISIONS)} for a sharded network",
                    found=precision,
                )
            require_equal_weights(self.lrm)
            shard(self.lrm, self.device_mesh, SHARDED_PRECISIONS[precision])

    def render(self, batch: Batch, views: Views) -> Prediction:
        """Reconstruct the objects of a batch from their input views and render the given views."""
        source = batch.input
        triplane = self.lrm(source.images, source.c2w, source.fxfycxcy)
        rendering = self.renderer(
            self.lrm.field(triplane), views.c2w, views.fxfycxcy, views.size, views.jitter
        )
        pixels = rendering.over(views.background[:, :, None, None])  # (B, V, H, W, 3)
        return Prediction(pixels.permute(0, 1, 4, 2, 3), rendering, triplane)

    def render_targets(self, batch: Batch) -> LossInputs:
        """Render the target views of a batch and return the inputs of the losses."""
        prediction, target = self.render(batch, batch.target), batch.target
        return LossInputs(
            prediction.images.flatten(0, 1), target.images.flatten(0, 1),
            prediction.rendering.opacity.flatten(0, 1), target.alpha.flatten(0, 1), prediction.triplane.planes,
        )  # fmt: skip

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        """Return -1, which skips the rest of the epoch, if the trainer must stop."""
        return -1 if self.trainer.should_stop else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch. ``on_before_optimizer_step`` logs the loss terms."""
        terms = self.objective(self.render_targets(batch), self.global_step)
        loss = sum(terms.values(), start=batch.target.images.new_zeros(()))
        self._terms.append({name: value.detach() for name, value in (terms | {"total": loss}).items()})
        self.current_sample_ids = (self.current_sample_ids if len(self._terms) > 1 else ()) + batch.ids
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate, and log it and the loss terms (averaged over accumulated batches and ranks)."""
        rate = self._set_learning_rate(optimizer)
        terms, self._terms = self._terms, []
        log_global_step(self, self.global_step + 1)  # Lightning's ModelCheckpoint needs it in every step
        if not self._logs:
            return
        # If it were a float, Lightning would copy it to the device and synchronize.
        self.log("optim/lr", torch.full((), rate, device=self.device))
        for name in terms[0]:
            mean = torch.stack([batch[name] for batch in terms]).mean()
            self.log(f"loss/{name}", self.trainer.strategy.reduce(mean))

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Set and return the learning rate of the next step."""
        rate = self.optimizer.learning_rate(self.global_step, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the gradient guard to the checkpoint."""
        checkpoint["guard"] = self.guard.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of the gradient guard."""
        self.guard.load_state(checkpoint["guard"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by its norm, or skip the step if the gradient guard rejects the gradient."""
        access = state_access(self.trainer, self.lrm)
        norm = access.gradient_norm()
        access.clip_or_skip(norm, gradient_clip_val, self.guard.check(norm))
        if self._logs:
            self.log("optim/grad_norm", norm)
            self.log("optim/skipped_steps", self.guard.num_skipped)

    # Lightning's annotation requires a tensor or a mapping, but any value is passed to callbacks.
    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Render the target views at full size and return them for callbacks."""
        prediction = self.render(batch, batch.target)
        return dataclasses.replace(prediction, images=prediction.images.clamp(0, 1))

    def test_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Render the target views in the same way as ``validation_step``."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Scene]:
        """Reconstruct the objects of a batch and return one scene per object."""
        source = batch.input
        field = self.lrm.field(self.lrm(source.images, source.c2w, source.fxfycxcy))
        scenes = []
        for index in range(len(batch.ids)):
            camera = InputCamera.like(source.c2w[index, 0], source.fxfycxcy[index, 0])
            single = dataclasses.replace(field, planes=field.planes[index : index + 1])
            scenes.append(Scene(single, camera, self.renderer))
        return scenes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the AdamW optimizer.

        The fused implementation is not used with a GradScaler, because Lightning does not support gradient clipping
        for this combination.
        """
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return self.optimizer.build(self.lrm, fused=not scaled)

    @property
    def _logs(self) -> bool:
        """Whether the current step is logged."""
        return is_logged_step(self.trainer, self.global_step + 1)
