"""Convert published weights of OpenLRM or TripoSR to a model folder.

WEIGHTS is a .safetensors, .pth, .pt, .ckpt or .bin file. Code in the file is not executed. If the file contains unknown
keys, nothing is written. The folder OUT contains config.yaml and model.safetensors.
"""

import argparse
from collections.abc import Sequence

from lrm_pl.errors import exit_on_error
from lrm_pl.paths import user_path

#: Descriptions of the coordinate frame and the scale of converted models.
COORDINATES = {
    "openlrm": "The scale is that of OpenLRM: the longest side of an object is 2. The field of view is 67 degrees.",
    "triposr": "One scene unit equals 0.87 units of TripoSR, and the +x axis of TripoSR is the -y axis of the scene.",
}


@exit_on_error
def main(arguments: Sequence[str]) -> None:
    """Run ``lrm convert``."""
    args = _parser().parse_args(arguments)

    from lrm_pl.inference.convert import convert, print_report  # imports torch
    from lrm_pl.weights.key_map import Hyperparameters

    numbers = Hyperparameters(args.heads, args.encoder_heads, args.image_size, args.samples_per_ray)
    conversion = convert(args.source, args.weights, args.out, numbers)
    print_report(conversion)
    count = sum(tensor.numel() for tensor in conversion.weights.values())
    print(f"{args.out}: config.yaml and model.safetensors, {count / 1e6:.1f} M parameters.")
    print(COORDINATES[args.source])
    print(f"To use the model: lrm infer IMAGE --ckpt {args.out}")
    layers = f"-c {args.out}/config.yaml -c configs/experiment/finetune.yaml"
    print(f"To fine-tune the model: lrm fit {layers} --weights.network {args.out} --data.folder DATA")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrm convert", description=__doc__)
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        choices=COORDINATES,
        required=True,
        help="architecture that the weights belong to",
    )
    add("weights", metavar="WEIGHTS", type=user_path, help="weight file")
    add("out", metavar="OUT", type=user_path, help="model folder to create")
    add = parser.add_argument_group(
        "hyperparameters that tensor shapes do not determine (default: those of the published models)"
    ).add_argument
    add("--heads", type=int, help="number of attention heads of the transformer (default: width / 64)")
    add("--encoder-heads", type=int, help="number of attention heads of the encoder (default: width / 64)")
    add("--image-size", type=int, help="input size of the encoder in pixels")
    add("--samples-per-ray", type=int, help="number of samples per ray")
    return parser
