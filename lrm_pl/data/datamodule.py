"""The LightningDataModule over a folder of shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import lightning as L
from torch.utils.data import DataLoader

from lrm_pl.data.batch import Batch, collate
from lrm_pl.data.dataset import EvaluationSet, TrainingStream
from lrm_pl.data.manifest import Split, read_manifest
from lrm_pl.data.transforms import CropConfig
from lrm_pl.errors import InputError

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
        self.seed, self.streams = seed, streams
        # Where the run started, or goes on: the global position g, and the batches it had had by then.
        self.position, self.done = 0, 0

    def setup(self, stage: str) -> None:
        """Read the manifest and check that the shards can serve this run.

        Raises:
            InputError: No shards, damaged shards, or too few views.
        """
        self.manifest = read_manifest(self.folder)
        needed = 1 + self.side_views + self.unseen_views
        if self.manifest.views < needed:
            raise InputError(
                f"{self.folder}: expected at least {needed} views an object (1 input, {self.side_views} side, "
                f"{self.unseen_views} unseen), found {self.manifest.views}; lower data.side_views or "
                f"data.unseen_views, or run `make render-shards VIEWS={needed} OUT=...`"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Make the stream of what is left of the run.

        A resumed run may have another batch size or accumulation: it goes on at its position g. Gradients that were
        being accumulated when the checkpoint was taken are lost (Lightning keeps none); their samples count as seen.
        """
        assert self.trainer is not None
        if self.trainer.max_steps < 1:
            raise InputError(
                f"expected trainer.max_steps, found {self.trainer.max_steps}: a run is counted in steps, not epochs"
            )
        steps = max(0, self.trainer.max_steps - self.trainer.global_step)
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
            steps * self.trainer.accumulate_grad_batches,
            self.position,
            self.done,
        )
        return DataLoader(stream, batch_size=None, num_workers=self.workers, pin_memory=False)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Make the loaders of ``EVALUATION_SETS``, one object a batch; "heldout" may be empty."""
        return [self.evaluation_loader("unseen"), self.evaluation_loader("heldout")]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Serve ``lrm test`` with the same two sets."""
        return self.val_dataloader()

    def evaluation_loader(self, name: str, limit: int | None = None) -> DataLoader[Batch]:
        """Make one evaluation loader by its name in ``EVALUATION_SETS``, of at most ``limit`` objects."""
        splits: dict[str, Split] = {"unseen": "train", "heldout": "val"}
        views = range(self.manifest.views - self.unseen_views, self.manifest.views)
        return self._evaluation_loader(splits[name], views, limit)

    def training_views_loader(self, limit: int | None = None) -> DataLoader[Batch]:
        """Make a loader of the training views of the training objects, whole, of at most ``limit`` objects."""
        views = range(self.manifest.views - self.unseen_views)
        return self._evaluation_loader("train", views, limit)

    def _evaluation_loader(self, split: Split, views: Sequence[int], limit: int | None) -> DataLoader[Batch]:
        dataset = EvaluationSet(self.folder, self.manifest, split, views, limit)
        return DataLoader(dataset, batch_size=1, collate_fn=collate, num_workers=self.workers)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is: the global position g, and the batches that it took to get there."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total
        batches = progress.processed  # type: ignore[attr-defined]  # annotated with the base class
        return {"position": self.position + (batches - self.done) * self.batch_size, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's position."""
        self.position, self.done = int(state_dict["position"]), int(state_dict["batches"])
