"""The LightningModule: the steps, the optimizer, the losses by name. No plotting, no metric maths, no files."""

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
from lrm_pl.training.logged import is_logged, log_step
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks, require_equal_weights, shard
from lrm_pl.training.precision import Float32Convolutions
from lrm_pl.training.sharded_state import holder_of
from lrm_pl.training.supported import (
    require_own_optimizer,
    require_supported_length,
    require_supported_settings,
    require_trained,
)
from lrm_pl.weights.encoders import pretrained_perceptual_loss

logger = logging.getLogger(__name__)

#: What blocks compute in and are gathered in when they are sharded, by the trainer's precision.
SHARDED_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


@dataclasses.dataclass
class Prediction:
    """What an evaluation step returns to the callbacks.

    Attributes:
        images: (B, V, 3, H, W) rendered views over the targets' backgrounds, in [0, 1].
        rendering: The same pixels with opacity and depth.
        triplane: What they were rendered from.
    """

    images: Float[Tensor, "B V 3 H W"]
    rendering: Rendering
    triplane: Triplane


class LRMModule(L.LightningModule):
    """Train an LRM: one input view in, the input view and side views rendered and compared (LRM, section 3.4).

    Args:
        lrm: The network.
        renderer: The volume renderer.
        objective: The loss terms.
        optimizer: AdamW and its schedule.
        parallel: What is done to the network's blocks from outside.
        guard: When a step with a bad gradient is skipped.
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
        self.current_sample_ids: tuple[str, ...] = ()  # ids of the samples of the newest step, of this rank
        self._terms: list[dict[str, Tensor]] = []  # loss terms of the step's accumulated batches
        self._configured = False

    def setup(self, stage: str) -> None:
        """Refuse settings of the trainer that cannot be kept, and parameters that would not be trained.

        An objective with LPIPS whose network nobody has attached is given the pretrained one.

        Raises:
            InputError: There are some, or the weights of LPIPS cannot be had.
        """
        require_supported_settings(self.trainer)
        require_trained(self, self.lrm)
        if stage == "fit":
            require_supported_length(self.trainer)
        if stage == "fit" and self.objective.lpips and self.objective.perceptual is None:
            loss = pretrained_perceptual_loss("vgg")
            self.objective.perceptual = loss.to(self.trainer.strategy.root_device)

    def configure_callbacks(self) -> list[L.Callback]:
        """Keep float32 training free of TF32, and measure validations where the trainer has nothing that does."""
        there = self.trainer.callbacks  # type: ignore[attr-defined]
        own: list[L.Callback] = [Float32Convolutions(), ImageMetricsLogger()]
        return [one for one in own if not any(isinstance(other, type(one)) for other in there)]

    def on_fit_start(self) -> None:
        """Reject a custom ``configure_optimizers``.

        Raises:
            InputError: Its optimizer or schedule is not the one of ``optimizer``.
        """
        require_own_optimizer(self.trainer)

    def on_train_start(self) -> None:
        """Set the learning rate of the first step, and warn about an encoder without pretrained weights."""
        self._set_learning_rate(self.trainer.optimizers[0])
        if self.global_step == 0 and not self.lrm.encoder.has_weights and self.trainer.is_global_zero:
            logger.warning(
                "the encoder %s starts from random weights; encoder.load_pretrained(load_encoder_state(...)), of "
                "lrm_pl.weights.encoders, gives it the pretrained ones",
                self.lrm.encoder.name,
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> "LRMModule":  # type: ignore[override] # noqa: ANN401 - Lightning's
        """Load a checkpoint of Lightning into a new module; ``lrm``, ``renderer`` and ``objective`` are given anew.

        Args:
            checkpoint_path: A file that ``Trainer.save_checkpoint`` has written.
            options: Arguments of this class, and those of ``LightningModule.load_from_checkpoint``.

        Raises:
            InputError: The parts are not given, or it is a checkpoint of a CheckpointAndResume.
        """
        if isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_dir():
            raise InputError(
                expected="a file of Trainer.save_checkpoint",
                found=f"the folder {checkpoint_path}",
                remedy=(
                    "for inference, `lrm export` it and open the result with lrm_pl.LRMPipeline.from_pretrained; to "
                    "train on, give the trainer a CheckpointAndResume; for the weights alone, "
                    "load_network(find_checkpoint(folder), module.lrm) of lrm_pl.training.state and "
                    "lrm_pl.checkpoints"
                ),
            )
        missing = [part for part in ("lrm", "renderer", "objective") if part not in options]
        if missing and cls is LRMModule:  # a subclass may make them itself
            raise InputError(
                expected="the parts of the module, which checkpoints do not describe",
                found=f"no {', '.join(missing)}",
                remedy="give them: LRMModule.load_from_checkpoint(path, lrm=..., renderer=..., objective=...)",
            )
        return super().load_from_checkpoint(checkpoint_path, **options)

    def configure_model(self) -> None:
        """Prepare the blocks, and shard where the strategy has laid out a mesh; Lightning calls this more than once.

        Raises:
            InputError: A precision that cannot be sharded, or ranks that hold different weights.
        """
        if self._configured:
            return
        self._configured = True
        prepare_blocks(self.lrm, self.parallel)
        if self.device_mesh is not None:
            precision = str(self.trainer.precision)
            if precision not in SHARDED_PRECISIONS:
                raise InputError(
                    expected=f"a precision of {', '.join(SHARDED_PRECISIONS)} with a sharded network",
                    found=precision,
                )
            require_equal_weights(self.lrm)
            shard(self.lrm, self.device_mesh, SHARDED_PRECISIONS[precision])

    def render(self, batch: Batch, views: Views) -> Prediction:
        """Reconstruct the objects of a batch from their input views and render other views of them."""
        source = batch.input
        triplane = self.lrm(source.images, source.c2w, source.fxfycxcy)
        rendering = self.renderer(
            self.lrm.field(triplane), views.c2w, views.fxfycxcy, views.size, views.jitter
        )
        pixels = rendering.over(views.background[:, :, None, None])  # (B, V, H, W, 3)
        return Prediction(pixels.permute(0, 1, 4, 2, 3), rendering, triplane)

    def look(self, batch: Batch) -> LossInputs:
        """Render the target views of a batch, for the objective to judge."""
        prediction, target = self.render(batch, batch.target), batch.target
        return LossInputs(
            prediction.images.flatten(0, 1), target.images.flatten(0, 1),
            prediction.rendering.opacity.flatten(0, 1), target.alpha.flatten(0, 1), prediction.triplane.planes,
        )  # fmt: skip

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        """Leave the loop at once where the run is to stop: -1 is Lightning's word for it."""
        return -1 if self.trainer.should_stop else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch; ``on_before_optimizer_step`` logs its terms by name."""
        terms = self.objective(self.look(batch), self.global_step)
        loss = sum(terms.values(), start=batch.target.images.new_zeros(()))
        self._terms.append({name: value.detach() for name, value in (terms | {"total": loss}).items()})
        self.current_sample_ids = (self.current_sample_ids if len(self._terms) > 1 else ()) + batch.ids
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the step's learning rate; log it and the loss terms: means over accumulated batches and ranks."""
        rate = self._set_learning_rate(optimizer)
        terms, self._terms = self._terms, []
        log_step(self, self.global_step + 1)  # always: Lightning's ModelCheckpoint names its files by it
        if not self._logs:
            return
        self.log(
            "optim/lr", torch.full((), rate, device=self.device)
        )  # a float would be copied, and waited for
        for name in terms[0]:
            mean = torch.stack([batch[name] for batch in terms]).mean()
            self.log(f"loss/{name}", self.trainer.strategy.reduce(mean))

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Set the learning rate of the next step, and return it."""
        rate = self.optimizer.learning_rate(self.global_step, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        return rate

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the guard's state to the checkpoint."""
        checkpoint["guard"] = self.guard.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the guard's state."""
        self.guard.resume(checkpoint["guard"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by its norm, or skip the step if it is bad; nothing waits for the device."""
        holder = holder_of(self.trainer, self.lrm)
        norm = holder.gradient_norm()
        holder.clip_or_skip(norm, gradient_clip_val, self.guard.judge(norm))
        if self._logs:
            self.log("optim/grad_norm", norm)
            self.log("optim/skipped_steps", self.guard.num_skipped)

    # Lightning's type asks for a tensor or a mapping; it hands whatever comes to the callbacks.
    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Render whole target views; callbacks measure and show them."""
        prediction = self.render(batch, batch.target)
        return dataclasses.replace(prediction, images=prediction.images.clamp(0, 1))

    def test_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Do as in validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[Scene]:
        """Reconstruct the objects of a batch; a callback writes them."""
        source = batch.input
        field = self.lrm.field(self.lrm(source.images, source.c2w, source.fxfycxcy))
        scenes = []
        for index in range(len(batch.ids)):
            camera = InputCamera.like(source.c2w[index, 0], source.fxfycxcy[index, 0])
            one = dataclasses.replace(field, planes=field.planes[index : index + 1])
            scenes.append(Scene(one, camera, self.renderer))
        return scenes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make AdamW: fused, but for a GradScaler (16-mixed), under which Lightning cannot clip for a fused one."""
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return self.optimizer.build(self.lrm, fused=not scaled)

    @property
    def _logs(self) -> bool:
        """Whether the step that is being made is one that Lightning logs."""
        return is_logged(self.trainer, self.global_step + 1)
