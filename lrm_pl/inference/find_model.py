"""Find a trained network by what a user calls it: a run, a checkpoint, an exported folder, a name on the hub."""

import argparse
import dataclasses
from pathlib import Path

from lrm_pl.checkpoints import read_newest
from lrm_pl.errors import InputError
from lrm_pl.inference.background import BackgroundRemover
from lrm_pl.inference.locate import locate_network
from lrm_pl.inference.model_folder import CONFIG_NAME, SETUP_NAME, WEIGHTS_NAME, weights_hash
from lrm_pl.inference.pipeline import PretrainedLRM
from lrm_pl.kernels.device import choose_device, synchronize
from lrm_pl.storage import HUB


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network and where it comes from.

    Attributes:
        model: The network, in evaluation mode.
        source: What it was read from.
        step: Optimizer steps of its run; None where that is not known.
        sha256: Of its weights (``weights_hash``).
        note: What a user should know about it, or nothing.
    """

    model: PretrainedLRM
    source: str
    step: int | None
    sha256: str
    note: str = ""

    def wait(self) -> None:
        """Wait until the device has done what it was asked for."""
        synchronize(next(self.model.parameters()).device)


def open_trained(
    name: str | None,
    *,
    average: bool = False,
    device: str = "auto",
    remover: BackgroundRemover | None = None,
    config: Path | None = None,
) -> Trained:
    """Open a network.

    Args:
        name: A checkpoint, a run's folder (its newest whole checkpoint), a folder of `lrm export` or `lrm convert`, or
            ``hf://owner/name`` on the Hugging Face hub; None: the newest run in ``runs/lrm``.
        average: Whether the moving average is taken, of a run that keeps one.
        device: Where it computes; "auto" is a GPU if there is one.
        remover: What takes backgrounds out.
        config: The config.yaml of the run, where it is not above the checkpoint.

    Raises:
        InputError: There is none, or it is not what it should be.
    """
    name = locate_network(name)
    path = Path(name).expanduser()
    if path.name in (WEIGHTS_NAME, CONFIG_NAME) and (path.parent / WEIGHTS_NAME).is_file():
        path, name = path.parent, str(path.parent)
    on_hub = name.startswith(HUB)
    if on_hub or (path / WEIGHTS_NAME).is_file():
        if config is not None:
            raise InputError(
                expected="--config with a checkpoint",
                found=f"the exported network {name}",
                remedy="leave it out",
            )
        if average:
            raise InputError(
                expected="a run that keeps a moving average",
                found=f"the exported network {name}",
                remedy="leave --average out, or export the average: lrm export RUN OUT --average",
            )
        model, source = PretrainedLRM.from_pretrained(name), name
    else:
        model, source = read_newest(
            name,
            lambda found: (PretrainedLRM.from_checkpoint(found, config, average=average), found.path),
        )
        source += " (moving average)" if average else ""
    if remover is not None:
        model.remover = remover
    sha256 = weights_hash(model.network)
    note = "" if model.setup_known else f"{source}: no {SETUP_NAME} beside it: images are framed as LRM's are"
    return Trained(model.to(choose_device(device)), source, model.step, sha256, note)


def open_network(given: argparse.Namespace, device: str | None = None) -> Trained:
    """Open the network that the options name, with what takes backgrounds out.

    Args:
        given: Parsed options of ``add_network``, and of ``add_background`` where images come from outside.
        device: In place of ``--device``.

    Raises:
        InputError: There is none, or it is not what it should be.
    """
    remover = None
    if hasattr(given, "rembg_model"):
        remover = BackgroundRemover(path=given.rembg_model, sha256=given.rembg_sha256)
    return open_trained(
        given.ckpt, average=given.average, device=device or given.device, remover=remover, config=given.config
    )
