"""A trained network with all that it takes to use it: ``LRM.from_pretrained(path)(image)`` of ``lrm_pl``.

Folders are those of ``lrm export`` and ``lrm convert``, here or on the Hugging Face hub.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import Tensor, nn

from lrm_pl.checkpoints import Checkpoint, list_checkpoints, load_network, read_newest
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.images import (
    ImageError,
    framed,
    has_background,
    has_object,
    is_plain,
    open_image,
    to_rgb8,
    without_background,
)
from lrm_pl.inference.background import BackgroundRemover
from lrm_pl.inference.model_card import model_card, renamed
from lrm_pl.inference.model_folder import (
    CARD_NAME,
    CONFIG_NAME,
    SETUP_NAME,
    WEIGHTS_NAME,
    build_network,
    fill_pretrained,
    find_config,
    load_weights,
    read_model_section,
    read_setup,
    read_step,
)
from lrm_pl.inference.scene import Scene, as_tensor, reconstruct
from lrm_pl.progress import stage
from lrm_pl.storage import HUB

#: Side of the images that objects are framed in, at least; the network makes them smaller itself.
_FRAME = 512


class PretrainedLRM(nn.Module, PyTorchModelHubMixin):
    """A network, its renderer, and what images it is used to.

    ``save_pretrained`` and ``push_to_hub`` come from the hub's mixin.

    Args:
        model: The model section of a config: its parts ``lrm`` and ``renderer`` are built.
        setup: What images it is used to.
        card: Its model card; one is written unless given.
        remover: What takes backgrounds out; rembg's small network unless given.

    Attributes:
        step: Optimizer steps of the run that it comes from; None where that is not known.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        setup: InputFraming | None = None,
        card: str = "",
        remover: BackgroundRemover | None = None,
    ) -> None:
        super().__init__()
        self.network, self.renderer = build_network(model)
        self.network.eval().requires_grad_(False)
        self.model, self.card = dict(model), card
        self.setup, self.setup_known = setup or InputFraming(), setup is not None
        self.remover = remover or BackgroundRemover()
        self.step: int | None = None
        self._repository = ""
        self._hub_mixin_config = (
            None  # else the mixin writes config.json beside config.yaml, which says the same
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "PretrainedLRM":
        """Open a folder, or the repository of that name on the Hugging Face hub.

        Args:
            name: A folder of `lrm export` or `lrm convert`, a run, whose newest checkpoint is taken, a checkpoint, or
                the "owner/name" of a repository.
            revision: Branch, tag or commit of the repository.
            token: For the hub.
            cache_dir: Where the hub's files are kept.
            local_files_only: Whether the hub is not asked.

        Raises:
            InputError: There is no such thing, or it is not what it should be.
        """
        folder = Path(name).expanduser()
        if folder.name in (WEIGHTS_NAME, CONFIG_NAME) and folder.is_file():
            folder = folder.parent
        if not folder.is_dir():
            folder = _download(
                str(name).removeprefix(HUB), revision, token, cache_dir, local_files_only=local_files_only
            )
        if not (folder / WEIGHTS_NAME).is_file() and any(
            list_checkpoints(str(place)) for place in (folder, folder.parent, folder / "checkpoints")
        ):
            return read_newest(str(folder), cls.from_checkpoint)
        card = folder / CARD_NAME
        made = cls(
            read_model_section(folder / CONFIG_NAME),
            read_setup(folder),
            card.read_text() if card.is_file() else "",
        )
        load_weights(made.network, folder)
        made.step = read_step(folder)
        return made

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, config: Path | None = None, *, average: bool = False
    ) -> "PretrainedLRM":
        """Open the network of a checkpoint.

        Args:
            checkpoint: The checkpoint.
            config: The config.yaml of its run; None: the one above the checkpoint.
            average: Whether the moving average is taken.

        Raises:
            InputError: There is no such config, or the checkpoint is of another network or has no average.
        """
        config = find_config(checkpoint, config)
        made = cls(read_model_section(config), read_setup(config.parent))
        load_network(checkpoint, made.network, average=average)
        made.step = checkpoint.step
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the files; the mixin calls this."""
        name = self._repository or save_directory.resolve().name
        card = renamed(self.card, name) or model_card(name, "Saved from Python.", self.model, {})
        weights = {name: tensor.cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        fill_pretrained(
            save_directory, self.model, weights, "Saved from Python.", self.setup, card, self.step
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # noqa: ANN401 - the mixin's
        """Upload it, under a card that calls it by the repository's name; options are the mixin's.

        Raises:
            InputError: It is no full name: the card could not say how to open it.
        """
        if "/" not in repo_id:
            raise InputError(expected="a repository's full name, owner/name", found=f"{repo_id!r}")
        self._repository = repo_id
        try:
            return super().push_to_hub(repo_id, **options)
        finally:
            self._repository = ""

    def preprocess(self, source: str | Path | bytes | Image.Image | np.ndarray) -> Image.Image:
        """Make of a photo what the network is used to: the object alone, in the middle, as large as in training.

        Args:
            source: A file, its bytes, or an image: Pillow's, or an array of bytes (H, W, 3 or 4), RGB. Where most of
                its edge is opaque, the background is taken out.

        Returns:
            A square RGBA image.

        Raises:
            InputError: It is no image, or shows nothing.
        """
        if isinstance(source, str):
            source = Path(source)
        if isinstance(source, np.ndarray):
            if (
                source.dtype != np.uint8
                or source.ndim != 3
                or source.shape[2] not in (3, 4)
                or not source.size
            ):
                raise InputError(
                    expected="an image as bytes (H, W, 3 or 4)",
                    found=f"{source.dtype} {source.shape}",
                    remedy="of floats in [0, 1] make (255 * x).astype('uint8')",
                )
            source = Image.fromarray(source)
        image = to_rgb8(source) if isinstance(source, Image.Image) else open_image(source)
        if has_background(image):
            if is_plain(image):
                raise ImageError(expected="an object in the image", found="one color everywhere")
            with stage("background"):
                image = without_background(image, self.remover)
            if not has_object(image):
                raise ImageError(
                    expected="an object in the image",
                    found="none: all of it was taken for background",
                    remedy="give an image with an alpha channel, or another one",
                )
        side = max(_FRAME, self.network.encoder.image_size)
        return framed(image.convert("RGBA"), self.setup.foreground, side)

    def forward(
        self,
        image: str | Path | bytes | Image.Image | np.ndarray | Tensor,
        camera: InputCamera | None = None,
    ) -> Scene:
        """Reconstruct the object in an image.

        Args:
            image: A photo, which is preprocessed (``preprocess``); or a square (C, H, W)
                tensor in [0, 1] that is that already.
            camera: The camera that it is taken to be seen by; the one of training unless given.

        Raises:
            InputError: It is no image, shows nothing, or the network wants several.
        """
        pixels = image if isinstance(image, Tensor) else as_tensor(self.preprocess(image))
        with torch.inference_mode():
            return reconstruct(
                self.network,
                self.renderer,
                pixels,
                camera or self.setup.camera,
                self.setup.background,
                self.setup.threshold,
            )


def _download(
    name: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
    *,
    local_files_only: bool,
) -> Path:
    """Bring the files of a repository, and no others, into the hub's cache."""
    if (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    ):  # it was meant as a path
        raise InputError(
            expected=f"a folder of `lrm export`, a run or a checkpoint at {name}",
            found="a file" if Path(name).exists() else "nothing",
            remedy="correct the path",
        )
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, SETUP_NAME, CARD_NAME],
            )
        )
    except (  # ImportError: a SOCKS proxy, and nothing installed that speaks with it
        HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError, ImportError,
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            expected=f"a folder of `lrm export`, or a repository of the Hugging Face hub, named {name!r}",
            found=f"neither: {reason}",
        ) from error
