"""Convert published weights of OpenLRM or TripoSR to a model folder.

WEIGHTS is a .safetensors, .pth, .pt, .ckpt or .bin file. Code in the file is not executed. If the file contains unknown
keys, nothing is written. The folder OUT contains config.yaml and model.safetensors.
"""

import argparse
import sys
from collections.abc import Sequence

from lrm_pl.apps.options import fail
from lrm_pl.errors import InputError
from lrm_pl.paths import user_path

#: Descriptions of the coordinate frame and the scale of converted models.
COORDINATES = {
    "openlrm": "Objects are scaled as in OpenLRM: the longest side is 2 (cube-normalized); field of view 67 degrees.",
    "triposr": "One scene unit is 0.87 of TripoSR's, and its +x is -y here (weights/triposr.py, from_triposr_world).",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(sys.argv[2:] if arguments is None else arguments)

    from lrm_pl.inference.convert import convert, print_report  # imports torch
    from lrm_pl.weights.key_map import Hyperparameters

    numbers = Hyperparameters(args.heads, args.encoder_heads, args.image_size, args.samples_per_ray)
    try:
        conversion = convert(args.source, args.weights, args.out, numbers)
    except (InputError, OSError) as error:
        fail(error)
    print_report(conversion)
    count = sum(tensor.numel() for tensor in conversion.weights.values())
    print(f"{args.out}: config.yaml and model.safetensors, {count / 1e6:.1f} M parameters.")
    print(COORDINATES[args.source])
    print(f"Use it: lrm infer IMAGE --ckpt {args.out}")
    layers = f"-c {args.out}/config.yaml -c configs/experiment/finetune.yaml"
    print(f"Fine-tune it: lrm fit {layers} --weights.network {args.out} --data.folder DATA")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm convert", description=__doc__)
    parser.add_argument(
        "--from", dest="source", choices=COORDINATES, required=True, help="architecture of the weights"
    )
    parser.add_argument("weights", metavar="WEIGHTS", type=user_path, help="weight file")
    parser.add_argument("out", metavar="OUT", type=user_path, help="folder to create")
    unseen = parser.add_argument_group(
        "hyperparameters that tensor shapes do not determine (default: those of the published models)"
    )
    unseen.add_argument("--heads", type=int, help="attention heads of the transformer (width / 64)")
    unseen.add_argument("--encoder-heads", type=int, help="attention heads of the encoder (width / 64)")
    unseen.add_argument("--image-size", type=int, help="input size of the encoder, pixels")
    unseen.add_argument("--samples-per-ray", type=int, help="samples per ray")
    return parser
