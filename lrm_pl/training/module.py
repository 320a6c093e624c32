"""The LightningModule: the steps, the optimiser, the losses by name. No plotting, no metric maths, no files."""

import dataclasses
from typing import Any

import lightning as L
from jaxtyping import Float
from torch import Tensor

from lrm_pl.data.batch import Batch, Views
from lrm_pl.losses.objective import Objective
from lrm_pl.models.lrm import LRM
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.volume import Renderer
from lrm_pl.training.optim import OptimizerConfig


@dataclasses.dataclass
class Prediction:
    """What an evaluation step returns to the callbacks.

    Attributes:
        images: (B, V, 3, H, W) rendered views over the targets' backgrounds, in [0, 1].
        rendering: The same pixels with opacity and depth.
    """

    images: Float[Tensor, "B V 3 H W"]
    rendering: Rendering


class LRMModule(L.LightningModule):
    """Train an LRM: one input view in, the input view and side views rendered and compared (LRM, section 3.4).

    Args:
        lrm: The network.
        renderer: The volume renderer.
        objective: The loss terms.
        optimizer: AdamW and its schedule.
    """

    def __init__(
        self,
        lrm: LRM,
        renderer: Renderer,
        objective: Objective,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.lrm, self.renderer, self.objective, self.optimizer = lrm, renderer, objective, optimizer

    def render(self, batch: Batch, views: Views) -> Prediction:
        """Reconstruct the objects of a batch from their input views and render other views of them."""
        source = batch.input
        triplane = self.lrm(source.images[:, 0], source.c2w[:, 0], source.fxfycxcy[:, 0])
        rendering = self.renderer(
            self.lrm.field(triplane), views.c2w, views.fxfycxcy, views.size, views.jitter
        )
        pixels = rendering.over(views.background[:, :, None, None])  # (B, V, H, W, 3)
        return Prediction(pixels.permute(0, 1, 4, 2, 3), rendering)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute and log the loss terms by name."""
        prediction = self.render(batch, batch.target).images
        terms = self.objective(prediction.flatten(0, 1), batch.target.images.flatten(0, 1), self.global_step)
        loss = sum(terms.values(), start=prediction.new_zeros(()))
        for name, value in terms.items():
            self.log(f"loss/{name}", value, batch_size=len(batch.ids))
        self.log("loss/total", loss, prog_bar=True, batch_size=len(batch.ids))
        return loss

    # Lightning's type asks for a tensor or a mapping; it hands whatever comes to the callbacks.
    def validation_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Render whole target views; callbacks measure and show them."""
        prediction = self.render(batch, batch.target)
        return Prediction(prediction.images.clamp(0, 1), prediction.rendering)

    def test_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Do as in validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union is wider than its documentation
        """Make AdamW and the schedule for this run's length."""
        optimizer, schedule = self.optimizer.build(self.lrm, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
