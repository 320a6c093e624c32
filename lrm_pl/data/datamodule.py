"""The LightningDataModule over a folder of shards."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from lrm_pl.data.batch import Batch, PackedBatch, collate
from lrm_pl.data.cache import CacheConfig
from lrm_pl.data.manifest import Split
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.stream import BatchPartition, EvaluationSet, TrainingStream
from lrm_pl.data.transforms import Augmentation, CropConfig, CropStage
from lrm_pl.data.workers import ignore_stop_signals, start_method
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import on_cuda

logger = logging.getLogger(__name__)

#: What the two validation loaders hold, in their order.
EVALUATION_SETS = ("unseen", "heldout")

#: Objects, and views of each, that tell what images a network is trained on.
_SETUP_OBJECTS, _SETUP_VIEWS = 32, 4


class ShardDataModule(L.LightningDataModule):
    """Feed training and evaluation from a folder of shards (``make render-shards`` makes one).

    Validation has two sets: "unseen", the unseen views of the training objects, and "heldout", the same views of
    the objects of the split "val". Both get the first views as input.

    Args:
        folder: Folder of the shards, with a manifest.json; or its URL (``s3://``, ``gs://``, ``https://``).
        weight: How often each of its objects comes in an epoch, where other sets are mixed in.
        also: Other sets that are mixed in (LRM: Objaverse once, MVImgNet three times an epoch).
        cache: How shards at a URL are read.
        batch_size: Objects an optimizer step, over all processes and accumulated batches together: the run is the
            same whatever the number of processes, which must divide it (times ``accumulate_grad_batches``).
        side_views: Target views besides the input views (the paper: 3).
        unseen_views: The last views of every object, never trained on: what validation renders.
        val_objects: So many objects of each set are validated on, evenly spread over it, whatever the number of
            processes; null: all.
        input_pool: The (first) input view is one of the first so many views; null means any training view, as in the
            paper. Few make a small data set learnable in minutes: each input view is a scene of its own to learn,
            because the canonical frame turns with it.
        crop: Sizes of the target windows in training.
        crop_stages: Other sizes from later steps on (progressive resolution).
        camera_noise: Noise on the cameras that the network is told.
        max_bad_share: Fraction of the samples that may be unreadable before training stops and lists them; their places
            are taken by others. 1 lets any number pass.
        workers: Processes that decode; 0 decodes in the training process.
        seed: Seed of the order of samples and of all augmentation; null: that of ``seed_everything``, or 0.
        streams: Streams that an epoch is cut into, so that neighbors in a batch come from different shards.
    """

    def __init__(
        self,
        folder: str = "data/demo",
        weight: int = 1,
        also: Sequence[DataSet] = (),
        cache: CacheConfig = CacheConfig(),  # noqa: B008 - frozen
        batch_size: int = 4,
        side_views: int = 3,
        unseen_views: int = 4,
        val_objects: int | None = None,
        input_pool: int | None = None,
        crop: CropConfig = CropConfig(),  # noqa: B008 - frozen
        crop_stages: Sequence[CropStage] = (),
        camera_noise: float = 0.0,
        max_bad_share: float = 0.01,
        workers: int = 2,
        seed: int | None = None,
        streams: int = 64,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("side_views", side_views, 0),
            ("unseen_views", unseen_views, 1),
            ("input_pool", input_pool, 1),
            ("workers", workers, 0),
            ("seed", seed, 0),
            ("streams", streams, 1),
        ):
            if value is not None and value < least:
                raise InputError(
                    expected=f"a data.{name} of at least {least}", found=value, remedy="correct it"
                )
        if not 0 <= max_bad_share <= 1:
            raise InputError(expected="a data.max_bad_share in [0, 1]", found=max_bad_share)
        if val_objects is not None and val_objects < 1:
            raise InputError(
                expected="a data.val_objects of at least 1",
                found=val_objects,
                remedy="null validates on all, and --trainer.limit_val_batches 0 not at all",
            )
        self.max_bad_share, self.val_objects = max_bad_share, val_objects
        self.folder, self.batch_size, self.side_views = folder, batch_size, side_views
        self.sets, self.cache = (DataSet(folder, weight), *also), cache
        self.unseen_views, self.input_pool, self.workers = unseen_views, input_pool, workers
        self.inputs = 1  # views that the network is given; `lrm fit` takes them from the network
        self.augmentation = Augmentation(crop, tuple(crop_stages), camera_noise)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed  # Lightning's variable
        self.streams = streams
        self._has_warned = False
        self._begin()

    def _begin(self) -> None:
        # Where this start of the run begins: optimizer steps done, and the global position g that they led to.
        self._step, self._position = 0, 0
        self._resumed_by_lightning = False

    def setup(self, stage: str) -> None:
        """Read the manifest and check that the shards can serve this run; a fit begins anew until it is resumed.

        Raises:
            InputError: No shards, damaged shards, or too few views.
        """
        if stage == "fit":
            self._begin()
        self.mixture = Mixture(self.sets, self.cache)
        needed = self.inputs + self.side_views + self.unseen_views
        for source, manifest, _ in self.mixture.members:
            if manifest.views < needed:
                raise InputError(
                    subject=source.location,
                    expected=(
                        f"at least {needed} views an object ({self.inputs} input, {self.side_views} side, "
                        f"{self.unseen_views} unseen)"
                    ),
                    found=manifest.views,
                    remedy=(
                        f"lower data.side_views or data.unseen_views, or run `make render-shards VIEWS={needed} "
                        "OUT=...`"
                    ),
                )

    @property
    def share(self) -> BatchPartition:
        """This process's part of every batch.

        Raises:
            InputError: The processes do not divide the batch, or steps are not what the run is counted in.
        """
        trainer = self._ready()
        if trainer.max_steps < 1:
            raise InputError(
                expected="trainer.max_steps",
                found=f"{trainer.max_steps}: a run is counted in steps, not epochs",
            )
        return BatchPartition(
            self.batch_size,
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches,
        )

    def position(self, step: int) -> int:
        """Return the global position g after ``step`` optimizer steps of the run: the whole state of the data."""
        return self._position + (step - self._step) * self.batch_size

    def resume(self, step: int, position: int) -> None:
        """Go on after ``step`` optimizer steps, at position g; batch size, processes and workers may have changed."""
        self._step, self._position = step, position

    def state_dict(self) -> dict[str, int]:
        """Return the position in the data, for Lightning checkpoints."""
        step = self._ready().global_step
        return {"step": step, "position": self.position(step)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a Lightning checkpoint, whose loops have already counted the batches before it."""
        self.resume(state_dict["step"], state_dict["position"])
        self._resumed_by_lightning = True

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Make the loader of what is left of the run.

        Raises:
            InputError: The data cannot feed it.
        """
        trainer = self._ready()
        if trainer.global_rank == 0 and not self._has_warned:
            self._warn_of_enlarged_views()
        stream = TrainingStream(
            self.mixture,
            self.share,
            self.inputs,
            self.side_views,
            self.unseen_views,
            self.input_pool,
            self.augmentation,
            self.seed,
            self.streams,
            max(0, trainer.max_steps - self._step),
            self._step,
            self._position,
            counted=self._step if self._resumed_by_lightning else 0,
        )
        return self._loader(stream, batch_size=None)

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        """Make the loaders of ``EVALUATION_SETS``, one object a batch; "heldout" may be empty."""
        return [self.evaluation_loader(name, self.val_objects) for name in EVALUATION_SETS]

    def test_dataloader(self) -> list[DataLoader[PackedBatch]]:
        """Serve ``lrm test`` with all objects of the same two sets."""
        return [self.evaluation_loader(name) for name in EVALUATION_SETS]

    def predict_dataloader(self) -> DataLoader[PackedBatch]:
        """Serve ``lrm predict`` with the held-out objects."""
        return self.evaluation_loader("heldout")

    def evaluation_loader(self, name: str, limit: int | None = None) -> DataLoader[PackedBatch]:
        """Make one evaluation loader by its name in ``EVALUATION_SETS``, of at most ``limit`` objects."""
        splits: dict[str, Split] = {"unseen": "train", "heldout": "val"}
        views = slice(-self.unseen_views, None) if self.unseen_views else slice(0)
        return self._evaluation_loader(splits[name], views, limit)

    def training_views_loader(self, limit: int | None = None) -> DataLoader[PackedBatch]:
        """Make a loader of the training views of the training objects, whole, of at most ``limit`` objects."""
        return self._evaluation_loader("train", slice(-self.unseen_views or None), limit)

    def setup_batches(self) -> Iterator[Batch]:
        """Read the input views of a few training objects, without a process of its own: ``measure_framing`` asks."""
        views = slice(min(self.input_pool or _SETUP_VIEWS, _SETUP_VIEWS))
        few = EvaluationSet(self.mixture, "train", self.inputs, views, _SETUP_OBJECTS)
        return (collate([item]).to("cpu") for item in few.readable())

    def _ready(self) -> Any:  # noqa: ANN401 - a Trainer, or what stands for one
        """Return the trainer, on whose processes and steps the loaders depend.

        Raises:
            InputError: There is none yet, or the manifests have not been read.
        """
        if self.trainer is None or not hasattr(self, "mixture"):
            raise InputError(
                expected="a trainer and a call of setup before a loader is made",
                found="a data module on its own",
                remedy='fit first, or set data.trainer = Trainer(max_steps=...) and call data.setup("fit")',
            )
        return self.trainer

    def _warn_of_enlarged_views(self) -> None:
        self._has_warned = True
        largest = max(crop.high for crop in self.augmentation.crops)
        for source, manifest, _ in self.mixture.members:
            if (side := manifest.resolution) is not None and side < largest:
                logger.warning(
                    "%s: views of %d pixels are enlarged to up to %d (data.crop.high), so targets are blurred; lower "
                    "data.crop, or render with RES=%d",
                    *(source.location, side, largest, largest),
                )

    def _evaluation_loader(self, split: Split, views: slice, limit: int | None) -> DataLoader[PackedBatch]:
        trainer = self._ready()
        rank, world = trainer.global_rank, trainer.world_size
        items = EvaluationSet(self.mixture, split, self.inputs, views, limit, rank, world)
        # Each validation iterates anew: its workers wait for the next one.
        return self._loader(items, batch_size=1, collate_fn=collate, persistent_workers=self.workers > 0)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[PackedBatch]:  # noqa: ANN401 - DataLoader's
        """Make a loader with this run's workers; batches are pinned where they are copied to a CUDA device."""
        return DataLoader(
            dataset,
            num_workers=self.workers,
            worker_init_fn=ignore_stop_signals,
            multiprocessing_context=start_method(self.workers),
            pin_memory=on_cuda(self._ready().strategy.root_device),
            **options,
        )
