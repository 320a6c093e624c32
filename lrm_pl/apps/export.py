"""Export a checkpoint to a folder with config.yaml and model.safetensors."""

import argparse
import logging
import shlex
from collections.abc import Sequence

from lrm_pl.data.manifest import require_no_folder
from lrm_pl.errors import exit_on_error
from lrm_pl.inference.find_model import find_model
from lrm_pl.paths import user_path


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm export``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parser().parse_args(arguments)
    find_model(args.checkpoint)
    require_no_folder(args.out)
    from lrm_pl.inference.export import export
    from lrm_pl.inference.model_folder import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
    from lrm_pl.training.ema import validates_with_average

    checkpoint, config = export(
        args.checkpoint, args.out, average=args.average, dtype=args.dtype, config=args.config
    )
    kind = "moving average" if args.average else "weights"
    size = (args.out / WEIGHTS_NAME).stat().st_size / 1e6
    print(f"{args.out / WEIGHTS_NAME}: {kind} of {checkpoint.path}, {args.dtype}, {size:.1f} MB")
    print(f"{args.out / CONFIG_NAME}: model section of the config; {args.out / CARD_NAME}: model card")
    print(f"To use the model: lrm infer IMAGE --ckpt {shlex.quote(str(args.out))}")
    if validates_with_average(config) == args.average:  # `lrm validate` measures these weights
        layers = ["-c", str(config), "--ckpt_path", checkpoint.path, "--data.val_objects", "null"]
        print(f"To evaluate the checkpoint: {shlex.join(['lrm', 'validate', *layers])}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm export", description=__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CKPT",
        help="checkpoint, or run folder whose newest valid checkpoint is exported",
    )
    add("out", metavar="OUT", type=user_path, help="model folder to create")
    add("--average", action="store_true", help="export the moving average of the weights")
    add(
        "--dtype",
        choices=("float32", "bf16"),
        default="float32",
        help="data type of the exported weights (default: %(default)s)",
    )
    add("--config", type=user_path, help="config.yaml of the run, if the file is not in the run folder")
    return parser
