"""The LightningDataModule over a folder of shards."""

from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from lrm_pl.data.batch import Batch, collate
from lrm_pl.data.dataset import EvaluationSet, TrainingStream
from lrm_pl.data.manifest import read_manifest
from lrm_pl.data.transforms import CropConfig

#: What the two validation loaders hold, in their order.
EVALUATION_SETS = ("unseen", "heldout")


@final
class ShardDataModule(L.LightningDataModule):
    """Feed training and evaluation from a folder of shards (``make render-shards`` makes one).

    Validation has two sets: "unseen", the unseen views of the training objects, and "heldout", the same views of
    the objects of the split "val". Both get view 0 as input.

    Args:
        folder: Folder of the shards, with a manifest.json.
        batch_size: Objects a batch.
        side_views: Target views besides the input view (the paper: 3).
        unseen_views: The last views of every object, never trained on: what validation renders.
        input_views: The input view is one of the first so many views; null means any training view, as in the
            paper. Few make a small data set learnable in minutes: each input view is a scene of its own to learn,
            because the canonical frame turns with it.
        crop: Sizes of the target windows in training.
        workers: Processes that decode; 0 decodes in the training process.
        seed: Seed of the order of samples and of all augmentation.
        streams: Streams that an epoch is cut into, so that neighbours in a batch come from different shards.
    """

    def __init__(
        self,
        folder: str = "data/demo",
        batch_size: int = 4,
        side_views: int = 3,
        unseen_views: int = 4,
        input_views: int | None = None,
        crop: CropConfig = CropConfig(),  # noqa: B008 - frozen
        workers: int = 2,
        seed: int = 0,
        streams: int = 64,
    ) -> None:
        super().__init__()
        self.folder, self.batch_size, self.side_views = Path(folder), batch_size, side_views
        self.unseen_views, self.input_views, self.crop, self.workers = (
            unseen_views,
            input_views,
            crop,
            workers,
        )
        self.seed, self.streams, self.position = seed, streams, 0

    def setup(self, stage: str) -> None:
        """Read the manifest and check that the shards can serve this run.

        Raises:
            ValueError: No shards, damaged shards, or too few views.
        """
        self.manifest = read_manifest(self.folder)
        needed = 1 + self.side_views + self.unseen_views
        if self.manifest.views < needed:
            raise ValueError(
                f"{self.folder}: expected at least {needed} views an object (1 input, {self.side_views} side, "
                f"{self.unseen_views} unseen), found {self.manifest.views}; lower data.side_views or "
                f"data.unseen_views, or run `make render-shards VIEWS={needed} OUT=...`"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Make the endless stream, as long as the run is in steps."""
        assert self.trainer is not None
        if self.trainer.max_steps < 1:
            raise ValueError(
                f"expected trainer.max_steps, found {self.trainer.max_steps}: a run is counted in steps, not epochs"
            )
        stream = TrainingStream(
            self.folder,
            self.manifest,
            self.batch_size,
            1 + self.side_views,
            self.unseen_views,
            self.input_views,
            self.crop,
            self.seed,
            self.streams,
            self.trainer.max_steps * self.trainer.accumulate_grad_batches,
            self.position,
        )
        return DataLoader(stream, batch_size=None, num_workers=self.workers, pin_memory=False)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Make the loaders of ``EVALUATION_SETS``, one object a batch; "heldout" may be empty."""
        return [self.evaluation_loader("unseen"), self.evaluation_loader("heldout")]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Serve ``lrm test`` with the same two sets."""
        return self.val_dataloader()

    def evaluation_loader(self, name: str) -> DataLoader[Batch]:
        """Make one evaluation loader by its name in ``EVALUATION_SETS``."""
        split = {"unseen": "train", "heldout": "val"}[name]
        views = range(self.manifest.views - self.unseen_views, self.manifest.views)
        dataset = EvaluationSet(self.folder, self.manifest, split, views)  # type: ignore[arg-type]
        return DataLoader(dataset, batch_size=1, collate_fn=collate, num_workers=self.workers)

    def mean_training_image(self) -> Float[Tensor, "3 H W"]:
        """Average the training views of all training objects, over white: a baseline."""
        dataset = EvaluationSet(
            self.folder, self.manifest, "train", range(self.manifest.views - self.unseen_views)
        )
        total, count = torch.zeros(()), 0
        for item in dataset:
            images = item.target.images
            total, count = total + images.sum(dim=0), count + len(images)
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """Return the one number that says where the stream is."""
        assert self.trainer is not None
        batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return {"position": batches * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's position."""
        self.position = int(state_dict["position"])
