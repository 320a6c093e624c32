"""Pipeline that combines a trained model with image preprocessing."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn

from lrm_pl.checkpoints.index import Checkpoint
from lrm_pl.checkpoints.network import load_network
from lrm_pl.checkpoints.selection import read_newest
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera, PosedCamera
from lrm_pl.images import (
    ImageError,
    frame_object,
    has_background,
    has_object,
    is_uniform,
    open_image,
    remove_background,
    to_rgb8,
)
from lrm_pl.inference.background import BackgroundRemover
from lrm_pl.inference.model_card import model_card, rename_model_card
from lrm_pl.inference.model_folder import (
    CARD_NAME,
    CONFIG_NAME,
    FRAMING_NAME,
    WEIGHTS_NAME,
    build_network,
    find_config,
    hash_weights,
    load_weights,
    read_framing,
    read_model_section,
    read_step,
    write_model_folder,
)
from lrm_pl.inference.scene import Scene, reconstruct, to_tensor
from lrm_pl.kernels.device import synchronize
from lrm_pl.progress import stage
from lrm_pl.storage import HUB

logger = logging.getLogger(__name__)

#: Minimum side length of the framed image in pixels. The encoder resizes the image.
_MIN_SIDE = 512


class LRMPipeline(nn.Module, PyTorchModelHubMixin):
    """A trained LRM in evaluation mode, with a renderer, background removal and input framing.

    Args:
        model: ``model`` section of a config, which describes the network and the renderer.
        framing: Framing of the input images. If None, images are framed as in the LRM paper.
        card: Text of the model card. If empty, ``save_pretrained`` generates a model card.
        remover: Background remover. If None, the small U^2-Net of rembg is used.

    Attributes:
        source: Path, URL or name from which the weights were loaded.
        step: Number of optimizer steps of training, or None if unknown.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        framing: InputFraming | None = None,
        card: str = "",
        remover: BackgroundRemover | None = None,
    ) -> None:
        super().__init__()
        self.network, self.renderer = build_network(model)
        self.network.eval().requires_grad_(False)
        self.model, self.card = dict(model), card
        self.framing = framing or InputFraming()
        self.remover = remover or BackgroundRemover()
        self.source = ""
        self.step: int | None = None
        self._repository = ""
        self._hub_mixin_config = None  # prevents the mixin from writing config.json

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        average: bool = False,
        config: Path | None = None,
        remover: BackgroundRemover | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "LRMPipeline":
        """Load a trained model on the CPU.

        Args:
            name: Path of a model folder, path or URL of a run folder or checkpoint, or name of a repository on the
                Hugging Face Hub ("owner/name" or "hf://owner/name"). The newest valid checkpoint of a run is used.
            average: Whether to load the moving average of the weights, which is available only for checkpoints.
            config: Path of the config.yaml of the run that a checkpoint belongs to. If None, the file in the run folder
                is used.
            remover: Background remover. If None, the small U^2-Net of rembg is used.
            revision: Branch, tag or commit of the repository on the Hub. If None, the default branch is used.
            token: Access token for the Hub. If None, the stored token is used.
            cache_dir: Cache folder of the Hub. If None, the default folder is used.
            local_files_only: Whether to use only cached files instead of connecting to the Hub.

        Raises:
            InputError: The model does not exist, or the weights do not match the config.
        """
        name = str(name)
        path = Path(name).expanduser()
        if path.name in (WEIGHTS_NAME, CONFIG_NAME) and (path.parent / WEIGHTS_NAME).is_file():
            path, name = path.parent, str(path.parent)
        on_hub = name.startswith(HUB) or ("://" not in name and not path.exists())
        if not on_hub and not (path / WEIGHTS_NAME).is_file():
            pipeline = read_newest(
                name, lambda checkpoint: cls.from_checkpoint(checkpoint, config, average=average)
            )
        else:
            if config is not None or average:
                raise InputError(
                    expected="a run or a checkpoint with the options --config and --average",
                    found=f"the model folder or repository {name}",
                    remedy="omit these options, or export the average with `lrm export RUN OUT --average`",
                )
            if on_hub:
                path = _download(
                    name.removeprefix(HUB),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            pipeline = cls._from_folder(path)
            pipeline.source = name
        pipeline.remover = remover or pipeline.remover
        return pipeline

    @classmethod
    def _from_folder(cls, folder: Path) -> "LRMPipeline":
        card = folder / CARD_NAME
        pipeline = cls(
            read_model_section(folder / CONFIG_NAME),
            _read_framing(folder),
            card.read_text() if card.is_file() else "",
        )
        load_weights(pipeline.network, folder)
        pipeline.step = read_step(folder)
        return pipeline

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, config: Path | None = None, *, average: bool = False
    ) -> "LRMPipeline":
        """Load the model of a checkpoint. The arguments and errors are the same as in ``from_pretrained``."""
        config = find_config(checkpoint, config)
        pipeline = cls(read_model_section(config), _read_framing(config.parent))
        load_network(checkpoint, pipeline.network, average=average)
        pipeline.source = checkpoint.path + (" (moving average)" if average else "")
        pipeline.step = checkpoint.step
        return pipeline

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the weights, which ``hash_weights`` computes when this property is first accessed."""
        return hash_weights(self.network)

    @property
    def description(self) -> str:
        """One-line description of the source, the step and the device."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.source}{step}, on {self.device}"

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        synchronize(self.device)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the files of a model folder. ``save_pretrained`` and ``push_to_hub`` call this method."""
        name = self._repository or save_directory.resolve().name
        card = rename_model_card(self.card, name) or model_card(name, "Saved from Python.", self.model, {})
        write_model_folder(
            save_directory,
            self.model,
            self.network.state_dict(),
            "Saved from Python.",
            self.framing,
            card,
            self.step,
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # noqa: ANN401 - signature of the mixin
        """Upload the model to the Hugging Face Hub. The model card contains the name of the repository.

        Args:
            repo_id: Full name of the repository, "owner/name".
            options: Additional arguments of ``PyTorchModelHubMixin.push_to_hub``.

        Raises:
            InputError: ``repo_id`` does not contain the name of an owner.
        """
        if "/" not in repo_id:
            raise InputError(expected="the full name of a repository (owner/name)", found=f"{repo_id!r}")
        self._repository = repo_id
        try:
            return super().push_to_hub(repo_id, **options)
        finally:
            self._repository = ""

    def preprocess(self, image: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
        """Remove the background of an image, and center and scale the object as in training.

        The background is removed only if most of the border of the image is opaque.

        Args:
            image: Path of an image file, content of an image file, Pillow image, or uint8 array of shape (H, W, 3) or
                (H, W, 4).

        Returns:
            A square RGBA image.

        Raises:
            InputError: The image cannot be read or contains no object.
        """
        image = _open(image)
        if has_background(image):
            if is_uniform(image):
                raise ImageError(expected="an object in the image", found="an image of a single color")
            with stage("background"):
                image = remove_background(image, self.remover)
            if not has_object(image):
                raise ImageError(
                    expected="an object in the image",
                    found="only background",
                    remedy="use an image with an alpha channel, or another image",
                )
        side = max(_MIN_SIDE, self.network.encoder.image_size)
        return frame_object(image.convert("RGBA"), self.framing.foreground, side)

    def forward(
        self,
        image: str | Path | bytes | Image.Image | np.ndarray | Tensor,
        camera: InputCamera | PosedCamera | None = None,
    ) -> Scene:
        """Reconstruct the object in an image.

        Args:
            image: Image as accepted by ``preprocess``, or preprocessed tensor of shape (C, H, W) with values in [0, 1].
            camera: Assumed camera of the image. If None, the camera used in training is assumed.

        Raises:
            InputError: The image cannot be read or contains no object, or the network requires several views.
        """
        pixels = image if isinstance(image, Tensor) else to_tensor(self.preprocess(image))
        framing = self.framing
        with torch.inference_mode():
            return reconstruct(
                self.network,
                self.renderer,
                pixels,
                camera or framing.camera,
                framing.background,
                framing.threshold,
            )


def _open(image: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
    """Return an upright 8-bit sRGB image in RGB or RGBA mode."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4) or not image.size:
            raise InputError(
                expected="a uint8 array of shape (H, W, 3) or (H, W, 4)",
                found=f"{image.dtype} {image.shape}",
                remedy="convert floats in [0, 1] with (255 * x).astype('uint8')",
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb8(image)
    return open_image(Path(image) if isinstance(image, str) else image)


def _read_framing(folder: Path) -> InputFraming | None:
    framing = read_framing(folder)
    if framing is None:
        logger.warning("%s does not contain %s. Images are framed as in the LRM paper.", folder, FRAMING_NAME)
    return framing


def _download(name: str, **options: Any) -> Path:  # noqa: ANN401 - options of snapshot_download
    """Download the files of a model folder from the Hugging Face Hub into the cache, and return the folder."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # the name is a path
        raise InputError(
            expected=f"a run, a checkpoint or a model folder at {name}",
            found="nothing",
            remedy="correct the path",
        )
    files = [CONFIG_NAME, WEIGHTS_NAME, FRAMING_NAME, CARD_NAME]
    try:
        return Path(snapshot_download(name, allow_patterns=files, **options))
    except (  # ImportError is raised if there is a SOCKS proxy but the package that supports it is missing
        HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError, ImportError,
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            expected=f"a model folder or a repository on the Hugging Face Hub named {name!r}",
            found=f"neither: {reason}",
        ) from error
