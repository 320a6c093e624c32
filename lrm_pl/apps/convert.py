"""``lrm convert --from openlrm|triposr WEIGHTS OUT``: weights that others published, as a network of ours.

Strict: every key of theirs is accounted for, or nothing is written. WEIGHTS is a .safetensors, .pth, .pt, .ckpt or
.bin file; nothing in it is run. OUT gets config.yaml and model.safetensors.
"""

import argparse
import sys
from collections.abc import Sequence

from lrm_pl.errors import InputError
from lrm_pl.paths import user_path

#: What to know of the world of a converted network.
WORLDS = {
    "openlrm": "Objects are those of OpenLRM: the longest side is 2 (cube-normalized), 67 degrees field of view.",
    "triposr": "One scene unit is 0.87 of TripoSR's, and its +x is our -y (io/convert_triposr.py, from_triposr_world).",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    parser = argparse.ArgumentParser(prog="lrm convert", description=__doc__)
    parser.add_argument(
        "--from", dest="source", choices=WORLDS, required=True, help="whose weights these are"
    )
    parser.add_argument("weights", metavar="WEIGHTS", type=user_path, help="the file")
    parser.add_argument("out", metavar="OUT", type=user_path, help="the folder to make")
    unseen = parser.add_argument_group("what tensors do not show; by default that of the published models")
    unseen.add_argument("--heads", type=int, help="attention heads of the transformer (width / 64)")
    unseen.add_argument("--encoder-heads", type=int, help="attention heads of the encoder (width / 64)")
    unseen.add_argument("--image-size", type=int, help="side of the image that the encoder sees")
    unseen.add_argument("--samples-per-ray", type=int, help="samples a ray")
    given = parser.parse_args(sys.argv[2:] if arguments is None else arguments)

    from lrm_pl.inference.convert import convert, print_report  # loads torch
    from lrm_pl.weights.key_map import UnseenNumbers

    numbers = UnseenNumbers(given.heads, given.encoder_heads, given.image_size, given.samples_per_ray)
    try:
        conversion = convert(given.source, given.weights, given.out, numbers)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    print_report(conversion)
    count = sum(tensor.numel() for tensor in conversion.weights.values())
    print(f"{given.out}: config.yaml and model.safetensors, {count / 1e6:.1f} M parameters.")
    print(WORLDS[given.source])
    print(f"Use it: lrm infer IMAGE --ckpt {given.out}")
    layers = f"-c {given.out}/config.yaml -c configs/experiment/finetune.yaml"
    print(f"Fine-tune it: lrm fit {layers} --weights.network {given.out} --data.folder DATA")
