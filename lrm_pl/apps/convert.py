"""``lrm convert --from openlrm|triposr WEIGHTS OUT``: weights that others published, as a network of ours.

Strict: every key of theirs is accounted for, or nothing is written. WEIGHTS is a .safetensors, .pth, .pt, .ckpt or
.bin file; nothing in it is run. OUT gets config.yaml and model.safetensors.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrm_pl.apps.paths import user_path
from lrm_pl.data.input_setup import InputSetup
from lrm_pl.data.manifest import require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.io.conversion import Conversion, UnseenNumbers
from lrm_pl.io.convert_openlrm import convert_openlrm
from lrm_pl.io.convert_triposr import convert_triposr
from lrm_pl.io.model_card import model_card
from lrm_pl.io.pretrained import build_network, write_pretrained
from lrm_pl.io.tensor_files import read_tensor_file

CONVERTERS = {"openlrm": convert_openlrm, "triposr": convert_triposr}

#: How their own programs show an object to the network, and where they cut its surface.
SETUPS = {
    # openlrm/utils/preprocess.py (a border of a fifth) and configs/infer-*.yaml
    "openlrm": InputSetup(distance=2.0, fov_deg=67.38, foreground=0.8, threshold=3.0),
    # run.py; our scene unit is 0.87 of theirs, and their cameras stand 1.9 of theirs away
    "triposr": InputSetup(1.9 / 0.87, 40.0, foreground=0.85, background=0.5, threshold=25.0),
}

#: What the published weights may be used for.
LICENCES = {
    "openlrm": "OpenLRM's published weights are CC BY-NC 4.0.",
    "triposr": "TripoSR's published weights are MIT.",
}

#: What to know of the world of a converted network.
WORLDS = {
    "openlrm": "Objects are those of OpenLRM: the longest side is 2 (cube-normalised), 67 degrees field of view.",
    "triposr": "One scene unit is 0.87 of TripoSR's, and its +x is our -y (io/convert_triposr.py, from_triposr_world).",
}


def convert(source: str, weights: Path, out: Path, unseen: UnseenNumbers) -> Conversion:
    """Convert a file of weights into a new folder, after its network was built and has taken them.

    Args:
        source: "openlrm" or "triposr".
        weights: The file.
        out: The folder, which must not exist; it appears when it is whole.
        unseen: What tensors do not show.

    Raises:
        InputError: The weights are not of that architecture, or OUT is there.
    """
    require_no_folder(out)
    if not weights.is_file():
        raise InputError(f"expected weights at {weights}, found no file; correct the path")
    conversion = CONVERTERS[source](read_tensor_file(weights, source), unseen)
    network, _ = build_network(conversion.model)
    network.load_state_dict(conversion.weights, strict=True)
    origin = f"Converted from {weights.name} ({source})."
    card = model_card(out.name, f"{origin} {LICENCES[source]}", conversion.model, {})
    write_pretrained(out, conversion.model, conversion.weights, origin, SETUPS[source], card)
    return conversion


def print_report(conversion: Conversion) -> None:
    """Print what became of each of their keys."""
    table = Table("theirs", "ours", "shape", "")
    for record in conversion.report:
        shape = " x ".join(map(str, record.shape))
        table.add_row("\n".join(record.theirs), record.ours or "left out", shape, record.how)
    # Wide enough for any key: a report is also read in files.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    parser = argparse.ArgumentParser(prog="lrm convert", description=__doc__)
    parser.add_argument(
        "--from", dest="source", choices=CONVERTERS, required=True, help="whose weights these are"
    )
    parser.add_argument("weights", metavar="WEIGHTS", type=user_path, help="the file")
    parser.add_argument("out", metavar="OUT", type=user_path, help="the folder to make")
    unseen = parser.add_argument_group("what tensors do not show; by default that of the published models")
    unseen.add_argument("--heads", type=int, help="attention heads of the transformer (width / 64)")
    unseen.add_argument("--encoder-heads", type=int, help="attention heads of the encoder (width / 64)")
    unseen.add_argument("--image-size", type=int, help="side of the image that the encoder sees")
    unseen.add_argument("--samples-per-ray", type=int, help="samples a ray")
    given = parser.parse_args(sys.argv[2:] if arguments is None else arguments)
    numbers = UnseenNumbers(given.heads, given.encoder_heads, given.image_size, given.samples_per_ray)
    try:
        conversion = convert(given.source, given.weights, given.out, numbers)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    print_report(conversion)
    count = sum(tensor.numel() for tensor in conversion.weights.values())
    print(f"{given.out}: config.yaml and model.safetensors, {count / 1e6:.1f} M parameters.")
    print(WORLDS[given.source])
    print(f"Use it: lrm infer PICTURE --ckpt {given.out}")
    layers = f"-c {given.out}/config.yaml -c configs/experiment/finetune.yaml"
    print(f"Fine-tune it: lrm fit {layers} --weights.network {given.out} --data.folder DATA")
