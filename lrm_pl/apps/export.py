"""``lrm export CKPT OUT``: from a checkpoint of any strategy to a folder with config.yaml and model.safetensors."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence

from lrm_pl.data.manifest import require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.inference.locate import locate_network
from lrm_pl.paths import user_path

#: What --dtype may be.
DTYPES = ("float32", "bf16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="lrm export", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder: its newest whole one"
    )
    parser.add_argument("out", metavar="OUT", type=user_path, help="the folder to make")
    parser.add_argument("--average", action="store_true", help="the moving average instead of the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the file (float32)")
    parser.add_argument(
        "--config", type=user_path, help="the run's config.yaml, where it is not above the checkpoint"
    )
    given = parser.parse_args(sys.argv[2:] if arguments is None else arguments)
    try:
        locate_network(given.checkpoint)
        require_no_folder(given.out)
        from lrm_pl.inference.export import export
        from lrm_pl.inference.model_folder import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
        from lrm_pl.training.ema import validates_average

        checkpoint, config = export(
            given.checkpoint, given.out, average=given.average, dtype=given.dtype, config=given.config
        )
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    what = "moving average" if given.average else "weights"
    size = (given.out / WEIGHTS_NAME).stat().st_size / 1e6
    print(f"{given.out / WEIGHTS_NAME}: {what} of {checkpoint.path}, {given.dtype}, {size:.1f} MB")
    print(f"{given.out / CONFIG_NAME}: its model section; {given.out / CARD_NAME}: its model card")
    print(f"Use it: lrm infer IMAGE --ckpt {shlex.quote(str(given.out))}")
    if validates_average(config) != given.average:
        return  # `lrm validate` measures the other weights of the checkpoint
    layers = ["-c", str(config), "--ckpt_path", checkpoint.path, "--data.val_objects", "null"]
    print(f"Measure that checkpoint: {shlex.join(['lrm', 'validate', *layers])}")
