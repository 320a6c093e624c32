"""The LightningDataModule for folders of shards."""

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
from lrm_pl.data.stream import BatchPartition, EvaluationSet, SampleStage, TrainingStream
from lrm_pl.data.transforms import Augmentation, CropConfig, CropStage
from lrm_pl.data.workers import ignore_stop_signals, start_method
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import on_cuda

logger = logging.getLogger(__name__)

#: Names of the two validation sets, in the order of the loaders.
EVALUATION_SETS = ("unseen", "heldout")

#: Number of objects and number of views per object from which the input framing is measured.
_FRAMING_OBJECTS, _FRAMING_VIEWS = 32, 4


class ShardDataModule(L.LightningDataModule):
    """Data module for folders of shards written by ``make render-shards``.

    There are two validation sets. "unseen" contains the last ``unseen_views`` views of the training objects, and
    "heldout" contains the last ``unseen_views`` views of the objects in the split "val". The first views of an object
    are the input views in both sets.

    Args:
        folder: Folder of the shards and ``manifest.json``, or the URL of such a folder (``s3://``, ``gs://``,
            ``https://``).
        weight: Number of times that each object in ``folder`` appears in an epoch.
        also: Additional data sets (in LRM, Objaverse appears once and MVImgNet three times per epoch).
        cache: Settings for reading shards from a URL.
        batch_size: Number of objects per optimizer step, including all processes and accumulated batches. It must be
            divisible by the number of processes times ``accumulate_grad_batches``.
        side_views: Number of target views per object in addition to the input views (LRM uses 3).
        unseen_views: Number of trailing views of each object that are used in validation, but not in training.
        val_objects: Maximum number of objects per validation set, evenly distributed over the set. If None, all objects
            are used.
        input_pool: Number of leading views of each object from which the first input view is drawn. If None, it is
            drawn from all training views (as in LRM). Small values shorten training on small data sets, because the
            canonical frame depends on the input view.
        crop: Settings for random resizing and cropping of target views.
        crop_stages: Crop settings that replace ``crop`` starting at a given step (progressive resolution).
        camera_noise: Half-width of the uniform noise added to the input cameras.
        stages: Functions from ``lrm_pl.data.transforms.DecodedSample`` to ``DecodedSample``, which are applied in order
            between decoding and augmentation. Each is given as an import path, or as a class with ``init_args`` whose
            instance is called. A function rejects a sample by raising ``SampleError`` or returning None.
        max_bad_fraction: Maximum fraction of unreadable or rejected samples, which are replaced by other samples. If it
            is exceeded, training stops. With 1, the fraction is not limited.
        workers: Number of data loading processes per training process. If 0, data is loaded in the training process.
        seed: Seed for the order of samples and for augmentation. If None, the seed of ``seed_everything`` is
            used, or 0 if there is none.
        streams: Number of streams into which the samples of an epoch are divided. Consecutive samples come from
            different streams, and thus mostly from different shards.
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
        stages: Sequence[SampleStage] = (),
        max_bad_fraction: float = 0.01,
        workers: int = 2,
        seed: int | None = None,
        streams: int = 64,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("side_views", side_views, 0),
            ("unseen_views", unseen_views, 1),
            ("val_objects", val_objects, 1),
            ("input_pool", input_pool, 1),
            ("workers", workers, 0),
            ("seed", seed, 0),
            ("streams", streams, 1),
        ):
            if value is not None and value < least:
                raise InputError(expected=f"a data.{name} of at least {least}", found=value)
        if not 0 <= max_bad_fraction <= 1:
            raise InputError(expected="a value of data.max_bad_fraction in [0, 1]", found=max_bad_fraction)
        self.max_bad_fraction, self.val_objects = max_bad_fraction, val_objects
        self.folder, self.batch_size, self.side_views = folder, batch_size, side_views
        self.sets, self.cache = (DataSet(folder, weight), *also), cache
        self.unseen_views, self.input_pool, self.workers = unseen_views, input_pool, workers
        self.inputs = 1  # `lrm fit` sets it to the number of input views of the network
        self.stages = tuple(stages)
        self.augmentation = Augmentation(crop, tuple(crop_stages), camera_noise)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed  # Lightning's variable
        self.streams = streams
        self._has_warned = False
        self._step, self._position, self._resumed_by_lightning = 0, 0, False

    def setup(self, stage: str) -> None:
        """Read the manifests and check the number of views. Training starts at position 0 unless ``resume`` is called.

        Raises:
            InputError: Shards are missing, are damaged or have too few views.
        """
        if stage == "fit":
            self._step, self._position, self._resumed_by_lightning = 0, 0, False
        self.mixture = Mixture(self.sets, self.cache)
        needed = self.inputs + self.side_views + self.unseen_views
        for source, manifest, _ in self.mixture.members:
            if manifest.views < needed:
                views = f"{self.inputs} input, {self.side_views} side, {self.unseen_views} unseen"
                raise InputError(
                    subject=source.location,
                    expected=f"at least {needed} views per object ({views})",
                    found=manifest.views,
                    remedy=f"lower data.side_views or data.unseen_views, or run `make render-shards VIEWS={needed}`",
                )

    @property
    def partition(self) -> BatchPartition:
        """Positions of each global batch that this process reads.

        Raises:
            InputError: The number of processes does not divide the batch size, or ``trainer.max_steps`` is not set.
        """
        trainer = self._ready()
        if trainer.max_steps < 1:
            raise InputError(
                expected="a trainer.max_steps of at least 1",
                found=trainer.max_steps,
                remedy="set --trainer.max_steps, because the length of a run is specified in steps, not in epochs",
            )
        return BatchPartition(
            self.batch_size, trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches
        )

    def position(self, step: int) -> int:
        """Return the global position after ``step`` optimizer steps, the complete state of the data loader."""
        return self._position + (step - self._step) * self.batch_size

    def resume(self, step: int, position: int) -> None:
        """Continue a run at a global position.

        The batch size, the number of processes and the number of workers may differ from those of the earlier steps.

        Args:
            step: Number of completed optimizer steps.
            position: Global position of the next sample.
        """
        self._step, self._position = step, position

    def state_dict(self) -> dict[str, int]:
        """Return the optimizer step and the global position for Lightning checkpoints."""
        step = self._ready().global_step
        return {"step": step, "position": self.position(step)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from a Lightning checkpoint. Lightning then counts the batches before the checkpoint as well."""
        self.resume(state_dict["step"], state_dict["position"])
        self._resumed_by_lightning = True

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        """Return the loader for the remaining steps.

        Raises:
            InputError: There are too few samples, the number of processes does not divide the batch size, or
                ``trainer.max_steps`` is not set.
        """
        trainer = self._ready()
        if trainer.global_rank == 0 and not self._has_warned:
            self._warn_of_enlarged_views()
        stream = TrainingStream(
            self.mixture,
            self.partition,
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
            stages=self.stages,
        )
        return self._loader(stream, batch_size=None)

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        """Return the loaders of the ``EVALUATION_SETS`` with one object per batch. The set "heldout" may be empty."""
        return [self.evaluation_loader(name, self.val_objects) for name in EVALUATION_SETS]

    def test_dataloader(self) -> list[DataLoader[PackedBatch]]:
        """Return the loaders of all objects of ``EVALUATION_SETS`` for ``lrm test``."""
        return [self.evaluation_loader(name) for name in EVALUATION_SETS]

    def predict_dataloader(self) -> DataLoader[PackedBatch]:
        """Return the loader of the held-out objects for ``lrm predict``."""
        return self.evaluation_loader("heldout")

    def evaluation_loader(self, name: str, limit: int | None = None) -> DataLoader[PackedBatch]:
        """Return the loader of an evaluation set.

        Args:
            name: Name in ``EVALUATION_SETS``.
            limit: Maximum number of objects. If None, all objects are used.
        """
        split: Split = "val" if name == "heldout" else "train"
        return self._evaluation_loader(split, slice(-self.unseen_views, None), limit)

    def training_views_loader(self, limit: int | None = None) -> DataLoader[PackedBatch]:
        """Return a loader of the training views of training objects at full size.

        Args:
            limit: Maximum number of objects. If None, all objects are used.
        """
        return self._evaluation_loader("train", slice(-self.unseen_views), limit)

    def framing_batches(self) -> Iterator[Batch]:
        """Yield input views of a few training objects for ``measure_framing``, without starting worker processes."""
        views = slice(min(self.input_pool or _FRAMING_VIEWS, _FRAMING_VIEWS))
        few = EvaluationSet(self.mixture, "train", self.inputs, views, _FRAMING_OBJECTS)
        return (collate([item]).to("cpu") for item in few.readable())

    def _ready(self) -> Any:  # noqa: ANN401 - a Trainer or a stub
        """Return the trainer.

        Raises:
            InputError: No trainer is attached, or ``setup`` has not been called.
        """
        if self.trainer is None or not hasattr(self, "mixture"):
            raise InputError(
                expected="a data module with a trainer and a completed setup",
                found="no trainer" if self.trainer is None else "no call to setup",
                remedy='set data.trainer = Trainer(max_steps=...) and call data.setup("fit")',
            )
        return self.trainer

    def _warn_of_enlarged_views(self) -> None:
        self._has_warned = True
        largest = max(crop.high for crop in self.augmentation.crops)
        for source, manifest, _ in self.mixture.members:
            if (side := manifest.resolution) is not None and side < largest:
                logger.warning(
                    "%s: views of %d pixels are enlarged to up to %d pixels (data.crop.high), which blurs the targets. "
                    "Lower data.crop.high, or render the views with RES=%d",
                    *(source.location, side, largest, largest),
                )

    def _evaluation_loader(self, split: Split, views: slice, limit: int | None) -> DataLoader[PackedBatch]:
        trainer = self._ready()
        rank, world = trainer.global_rank, trainer.world_size
        items = EvaluationSet(self.mixture, split, self.inputs, views, limit, rank, world)
        # Worker processes are reused in later validations.
        return self._loader(items, batch_size=1, collate_fn=collate, persistent_workers=self.workers > 0)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[PackedBatch]:  # noqa: ANN401 - DataLoader's
        """Return a loader with ``workers`` processes. For CUDA devices, batches are copied to pinned memory."""
        return DataLoader(
            dataset,
            num_workers=self.workers,
            worker_init_fn=ignore_stop_signals,
            multiprocessing_context=start_method(self.workers),
            pin_memory=on_cuda(self._ready().strategy.root_device),
            **options,
        )
